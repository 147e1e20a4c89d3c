"""Put the image tower on a phone: fuse a checkpoint, convert it to Core ML, time it (the paper's Table 2).

    python export.py                                   # out/student.pt -> out/MobileFetalCLIP.mlpackage
    python export.py runs/a/student.pt --labels brain  # and class probabilities, without a text tower
    python export.py --model ViT-L-14 --runs 50        # any open_clip model -> out/ViT-L-14.mlpackage
    python export.py --iphone --team ID --bundle ID    # and its latency on a connected iPhone (macOS, Xcode)

The package takes an RGB `image` and returns `embedding` (1, D), L2-normalised, and with --labels
`probabilities` (1, C), both fp32. Linux and macOS can convert; only macOS and phones can run the result.
"""

import asyncio
import contextlib
import hashlib
import io
import json
import logging
import platform
import re
import subprocess
import tempfile
import timeit
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
import tyro
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from torchvision.transforms.functional import to_pil_image

import dark
import evaluate
from dark import fail

# As it is imported, coremltools warns of untested versions and, on Linux, of the missing Core ML framework.
logging.getLogger("coremltools").setLevel(logging.ERROR)
import coremltools as ct
from coremltools.models.compute_device import MLNeuralEngineComputeDevice
from coremltools.models.ml_program.experimental import perf_utils, remote_device

WARM_UP = 10  # runs before the timed ones
# The processor's name, as macOS or Linux tells it, else its kind.
CPU_NAME = """
sysctl -n machdep.cpu.brand_string 2> /dev/null ||
grep -m 1 "model name" /proc/cpuinfo | sed "s/.*: //" | grep . ||
uname -m
"""


@dataclass
class Options:
    """Every setting; `python export.py --help` is made from these lines."""

    checkpoint: tyro.conf.Positional[str] = ""  # student.pt of dark.py; empty: out/student.pt
    out: str = ""  # package; empty: MobileFetalCLIP.mlpackage beside the checkpoint, or out/NAME.mlpackage
    precision: Literal["fp16", "fp32"] = "fp16"  # of weights and activations
    labels: str = ""  # planes | brain | FILE (JSON class -> [prompts]): adds probabilities
    runs: int = 200  # timed runs per latency
    model: str = ""  # any open_clip model, instead of a checkpoint
    weights: str = ""  # FILE or open_clip TAG for --model; empty: random, for timing
    context_length: int = 0  # tokens of --model; 0: its own
    mean: str = ""  # R,G,B of --model; empty: what open_clip lists
    std: str = ""  # R,G,B of --model; empty: what open_clip lists
    interpolation: Literal["", "bicubic", "bilinear"] = ""  # of --model; empty: what open_clip lists
    iphone: bool = False  # time it on the connected iPhone too (macOS with Xcode)
    team: str = ""  # Apple development team for --iphone
    bundle: str = ""  # bundle identifier for --iphone's app, such as org.example.bench


# ---------------------------------------------------------------- what the command line asks for


def parse_args(argv):
    args = dark.parse_flags(Options, argv, __doc__)
    if args.model and args.checkpoint:
        fail(f"{args.checkpoint} --model {args.model}: give one of them")
    of_a_model = args.weights or args.context_length or args.mean or args.std or args.interpolation
    if of_a_model and not args.model:
        fail("--weights, --context-length, --mean, --std, --interpolation belong to --model")
    if not (args.iphone == bool(args.team) == bool(args.bundle)):
        fail("--iphone, --team ID (developer.apple.com, Membership), --bundle ID (org.me.bench) go together")
    if args.runs < 1:
        fail(f"--runs {args.runs}: must be at least 1")
    return args


def choose_paths(args):
    """-> the package to write, and the file for its report. Ends in one line where they cannot be written."""
    checkpoint = Path(args.checkpoint or "out/student.pt")
    package = Path(args.out or checkpoint.with_name("MobileFetalCLIP.mlpackage"))
    report = package.with_name("export.json")
    if args.model and not args.out:  # so as not to replace a trained model's files
        name = re.sub(r"[^\w.-]+", "-", args.model)  # local-dir:/a/b -> local-dir-a-b
        package = Path(f"out/{name}.mlpackage")
        report = Path(f"out/{name}.json")
    if package.suffix != ".mlpackage" or (package.exists() and not (package / "Manifest.json").is_file()):
        fail(f"--out {package}: must end in .mlpackage, and only a Core ML package is replaced")
    # Tries a temporary file in the folder, or in its nearest parent that exists.
    with dark.user_error(f"--out {package}: cannot be written"):
        folder = next(parent for parent in package.parents if parent.exists())
        tempfile.TemporaryFile(dir=folder).close()
    return package, report


def find_iphone():
    with dark.user_error("--iphone: needs macOS, Xcode started once, devicectl (xcrun --find) on PATH"):
        phones = remote_device.Device.get_connected_devices(remote_device.DeviceType.IPHONE)
    if not phones:
        fail("--iphone: none is connected; plug it in, unlock it, let it trust this Mac")
    return phones[0]


# ---------------------------------------------------------------- the model that goes on the phone


def open_subject(args):
    """-> dark.Model in eval mode, and what the metadata says about the weights."""
    if args.model:
        path = args.weights
        model = dark.open_model(
            args.model, path, args.context_length, args.mean, args.std, args.interpolation
        )
        # local-dir:FOLDER and hf-hub:NAME bring weights.
        source = path or (args.model if ":" in args.model else "Random weights, for timing only")
        about = {}
    else:
        path = args.checkpoint or "out/student.pt"
        checkpoint = dark.load_checkpoint(path)
        model = dark.model_from_checkpoint(checkpoint)
        config = checkpoint["config"]
        source = path
        about = {"epoch": f"{checkpoint['epoch']:g}", "beta0": f"{config['beta0']}", "r": f"{config['r']}"}
    about["source"] = source.encode(errors="backslashreplace").decode()  # UTF-8, which a path need not be
    if Path(path).is_file():
        about["checkpoint_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    return model.eval(), about


def draw_images(size):
    """-> (4, 3, S, S) in steps of 1/255: coarse squares of colour, so that no two look alike to any tower."""
    images = F.interpolate(torch.rand(4, 3, 8, 8), (size, size))
    return (images * 255).round() / 255


class Phone(torch.nn.Module):
    """What runs on the phone: (n, 3, S, S) pixels in 0..1 -> embedding (n, D), unit norm, and with `classes`
    probabilities (n, C). classes: (C, D) embeddings of the classes' texts, times the learned scale."""

    def __init__(self, model, classes):
        super().__init__()
        self.visual = model.clip.visual
        self.register_buffer("mean", torch.tensor(model.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(model.std).view(1, 3, 1, 1))
        self.register_buffer("classes", classes)

    def forward(self, image):
        features = self.visual((image - self.mean) / self.std)
        if isinstance(features, tuple):  # CoCa's towers also return tokens
            features = features[0]
        embedding = F.normalize(features, dim=-1)  # (n, D)
        if self.classes is None:
            return (embedding,)
        logits = F.linear(embedding, self.classes)  # (n, D) x (D, C)
        return embedding, logits.softmax(-1)


def fuse(tower, images):
    """Merges training-time branches and their batch norms into single convolutions.

    tower: a Phone; images: (n, 3, S, S), n > 1. Returns the fused copy and the largest change of an
    embedding, or the tower itself and None where there is nothing to fuse, as in a ViT. Ends the program
    where the change is too large. It is judged in fp64, where a correct merge changes at most 1e-11 of the
    distance between two images and a wrong one 1e-2. In fp32 these could not be told apart in a fresh
    FastViT, which answers nearly the same to every image.
    """
    fused = timm.utils.reparameterize_model(tower)
    if fused.state_dict().keys() == tower.state_dict().keys():
        return tower, None
    fused = timm.utils.reparameterize_model(tower.double())
    before = tower(images.double())[0]  # (n, D), unit norm
    after = fused(images.double())[0]
    tower.float()  # to the bit as it was
    change = (before - after).norm(dim=1).max()
    apart = torch.pdist(before).min()
    if not change < 1e-9 * apart:
        fail(
            f"fusing changes an embedding by {change:.1e}, or all images look alike to it ({apart:.1e} apart)"
        )
    return fused.float(), change.item()


# ---------------------------------------------------------------- the Core ML package


def choose_precision(program, precision):
    """fp32 everywhere, or fp16 everywhere but in the head of the exported program."""
    if precision == "fp32":
        return ct.precision.FLOAT32
    # The head, a few thousand operations, is what Phone.forward does after the tower. It stays in fp32: in
    # fp16 the norm of an embedding was 4e-4 off 1, and logits near 100 step by 0.06. It is found by name,
    # since the names of the exported graph's nodes become the names of the Core ML operations.
    nodes = list(program.graph.nodes)
    # The stack of a node lists the modules it lies in. Phone is always one of them, the tower the next.
    in_tower = [i for i, node in enumerate(nodes) if len(node.meta.get("nn_module_stack", ())) > 1]
    head = {node.name for node in nodes[in_tower[-1] + 1 :]}
    return ct.transform.FP16ComputePrecision(op_selector=lambda operation: operation.name not in head)


def convert(tower, name, image, precision):
    """Phone -> Core ML model, not loaded. image: the type of its input, a picture or a (1, 3, S, S) array."""
    names = ["embedding"] if tower.classes is None else ["embedding", "probabilities"]
    no_alias = {torch.ops.aten.alias.default: lambda x: x}  # coremltools 9.0 does not know it
    no_bars = contextlib.redirect_stderr(io.StringIO())
    with dark.user_error(f"{name}: cannot be converted to Core ML"), no_bars:
        program = torch.export.export(tower, (torch.zeros(image.shape.shape),))
        program = program.run_decompositions(no_alias)
        return ct.convert(
            program,
            inputs=[image],
            outputs=[ct.TensorType(name=name, dtype=np.float32) for name in names],
            compute_precision=choose_precision(program, precision),
            minimum_deployment_target=ct.target.iOS17,
            skip_model_load=True,
        )


def describe(package, model, prompts, about):
    """Adds what Xcode shows and an app can read: strings, with lists as JSON."""
    labels = ", ".join(prompts)
    package.short_description = (
        f"Image tower of {model.name}; labels: {labels or 'none'}; source: {about['source']}"
    )
    package.author = "dark, an implementation of arXiv 2603.05421"
    package.license = "MIT for the code; weights keep the licence of what they were trained from"
    package.version = f"{dark.FORMAT} {about.get('checkpoint_sha256', about['source'])[:12]}"
    package.input_description["image"] = (
        f"RGB, {model.size} x {model.size}: zero-padded to a centred square, then resized "
        f"({model.interpolation}); scaled and normalised inside"
    )
    package.output_description["embedding"] = "L2-normalised image embedding"
    metadata = package.user_defined_metadata
    metadata.update(about)
    metadata["mean"] = json.dumps(model.mean)
    metadata["std"] = json.dumps(model.std)
    metadata["interpolation"] = model.interpolation
    if prompts:
        package.output_description["probabilities"] = f"softmax over {labels} (`labels` in the metadata)"
        metadata["labels"] = json.dumps(list(prompts))
        metadata["prompts"] = json.dumps(prompts)


def save(package, path):
    """Writes the package, returns its bytes. An old one is moved away only when the new one is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=path.parent) as folder:
        new = Path(folder) / path.name
        package.save(str(new))
        # 150 KB of the converter's debugging, which no app needs.
        (new / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
        # coremltools lets nobody but its user read the package. This sets the modes that the umask leaves.
        subprocess.run(["chmod", "-R", "=rwX", new], check=True)
        if path.exists():
            path.rename(Path(folder) / "replaced")
        new.rename(path)
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())


# ---------------------------------------------------------------- figures


def count_costs(trained, fused, image):
    """Parameters of the image towers, and multiply-accumulates of one image (1, 3, S, S) in units of 1e9."""
    # Two kinds of attention have no formula, and would count as nothing: the fast path of
    # nn.MultiheadAttention, and what is fused on a CPU.
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        fused(image)
    torch.backends.mha.set_fastpath_enabled(True)
    flops = counter.get_flop_counts()["Global"]
    macs = {}  # one counts as two operations
    macs["convolutions"] = flops.pop(torch.ops.aten.convolution, 0) / 2e9
    macs["attention"] = flops.pop(torch.ops.aten.bmm, 0) / 2e9
    macs["matrix products"] = sum(flops.values()) / 2e9
    count_parameters = lambda tower: sum(p.numel() for p in tower.visual.parameters())
    return {
        "visual_params": count_parameters(fused),
        "visual_params_unfused": count_parameters(trained),
        "gmacs": sum(macs.values()),
        "gmacs_by_kind": macs,
    }


def latency_row(runtime, units, precision, milliseconds):
    """A row of the latency table, of this machine."""
    median, p90 = np.percentile(milliseconds, (50, 90)).round(3).tolist()
    return {
        "runtime": runtime,
        "device": subprocess.getoutput(CPU_NAME),
        "os": platform.platform(terse=True),
        "compute_units": units,
        "precision": precision,
        "median_ms": median,
        "p90_ms": p90,
        "runs": len(milliseconds),
    }


def time_pytorch(trained, fused, image, runs):
    """A row for each tower."""
    towers = {"PyTorch unfused": trained, "PyTorch fused": fused}
    if fused is trained:
        towers = {"PyTorch": fused}
    rows = []
    for runtime, tower in towers.items():
        tower.to(memory_format=torch.channels_last)  # in which the fused tower is fastest
        # Median and p90 need single runs; torch.utils.benchmark would add two extra runs to each.
        seconds = timeit.repeat(lambda: tower(image), number=1, repeat=WARM_UP + runs)[WARM_UP:]
        rows.append(latency_row(runtime, "CPU, 1 thread", "fp32", 1e3 * np.array(seconds)))
    return rows


async def time_core_ml(package, inputs, args, expected=None, phone=None):
    """A row for each choice of compute units: of the phone, in coremltools' benchmark app, which is built and
    started first; else of this Mac, with the difference to PyTorch's embedding `expected` and the share of
    operations that prefer the Neural Engine."""
    rows = []
    if phone:
        credentials = remote_device.AppSigningCredentials(
            development_team=args.team, bundle_identifier=args.bundle
        )
        phone = await phone.prepare_for_model_debugging(credentials=credentials)
    for units in ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"):
        model = ct.models.MLModel(package, compute_units=ct.ComputeUnit[units], skip_model_load=bool(phone))
        benchmarker = perf_utils.MLModelBenchmarker(model=model, device=phone)
        timed = await benchmarker.benchmark_predict(inputs=inputs, iterations=WARM_UP + args.runs)
        row = latency_row("Core ML", units, args.precision, timed.samples[WARM_UP:])
        if phone:
            row["device"] = phone.name
            row["os"] = f"iOS {phone.os_version}"
        else:
            embedding = model.predict(inputs)["embedding"]
            row["difference"] = float(np.abs(embedding - expected).max())
            operations = await benchmarker.benchmark_operation_execution(inputs=inputs)
            row["neural_engine_share"] = neural_engine_share(operations)
        rows.append(row)
    if phone:
        phone.session.stop()
    return rows


def neural_engine_share(operations):
    """Share, of the operations that Core ML has planned, that it prefers to run on the Neural Engine."""
    on_engine = []
    for operation in operations:
        usage = operation.compute_device_usage
        if usage and operation.spec.type != "const":
            on_engine.append(isinstance(usage.preferred_compute_device, MLNeuralEngineComputeDevice))
    return sum(on_engine) / max(len(on_engine), 1)


def report(result, latency, path):
    """Writes both as JSON, then prints them, the latencies as a table."""
    dark.write_atomically(path, json.dumps(result | {"latency": latency}, indent=2).encode() + b"\n")
    show = lambda value: f"{value:.4g}" if isinstance(value, float) else f"{value}"
    for key, value in result.items():
        print(f"{key:24}{show(value)}")
    columns = list(max(latency, key=len))  # a Mac's rows have more than PyTorch's
    lines = [[show(row.get(key, "")) for key in columns] for row in latency]
    print()
    print(evaluate.aligned([columns, *lines], left=5))
    print(f"wrote {path}")


@torch.no_grad()
@dark.script()
def main(argv=None):
    args = parse_args(argv)
    package_path, report_path = choose_paths(args)
    prompts = evaluate.read_labels(args.labels) if args.labels else {}
    if args.labels and not prompts:
        fail(f"--labels {args.labels}: has no class")
    phone = find_iphone() if args.iphone else None
    start = timeit.default_timer()
    torch.manual_seed(0)
    torch.set_num_threads(1)  # one thread is disturbed least by other work, so that latencies repeat

    model, about = open_subject(args)
    classes = model.clip.logit_scale.exp() * evaluate.class_embeddings(model, prompts) if prompts else None
    trained = Phone(model, classes)
    images = draw_images(model.size)
    if not torch.cat(trained(images), dim=1).isfinite().all():
        fail(f"{about['source']}: an image's embedding is not finite: these weights are unusable")
    fused, change = fuse(trained, images)
    replaces = f"\nreplaces {package_path}" if package_path.exists() else ""
    print(f"{about['source']}: {model.name}, {model.size} x {model.size}{replaces}")

    image = images[:1]
    # An ImageType has one scale for all channels, so mean and std are in the graph.
    picture_type = ct.ImageType(name="image", shape=image.shape, scale=1 / 255, color_layout="RGB")
    package = convert(fused, model.name, picture_type, args.precision)
    describe(package, model, prompts, about)
    package_bytes = save(package, package_path)
    export_seconds = timeit.default_timer() - start
    latency = time_pytorch(trained, fused, image, args.runs)
    fused_over_unfused = None if change is None else latency[1]["median_ms"] / latency[0]["median_ms"]
    if platform.system() == "Darwin":
        picture = to_pil_image((image[0] * 255).round().byte())
        expected = fused(image)[0].numpy()
        latency += asyncio.run(time_core_ml(str(package_path), {"image": picture}, args, expected))
    result = {
        "model": model.name,
        "source": about["source"],
        "package": str(package_path),
        "precision": args.precision,
        "input_size": model.size,
        "labels": list(prompts),
        "package_mb": package_bytes / 1e6,
        "export_seconds": export_seconds,
        "fuse_difference": change,
        **count_costs(trained, fused, image),
        "fused_over_unfused": fused_over_unfused,
    }
    report(result, latency, report_path)
    if phone:  # coremltools 9.0 cannot send it an image, so it times a twin that takes an array
        array_type = ct.TensorType(name="image", shape=image.shape, dtype=np.float32)
        twin = convert(fused, model.name, array_type, args.precision)
        inputs = {"image": image.numpy()}
        with dark.user_error("--iphone: unlock it, in Developer Mode; check --team and --bundle in Xcode"):
            latency += asyncio.run(time_core_ml(twin.package_path, inputs, args, phone=phone))
        report(result, latency, report_path)


if __name__ == "__main__":
    main()
