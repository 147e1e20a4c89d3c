"""Put the image tower on a phone: checkpoint -> fused -> Core ML package -> latency table (the paper's Table 2).

    python export.py                                   # out/student.pt -> out/MobileFetalCLIP.mlpackage
    python export.py --labels planes                   # and zero-shot probabilities, with no text tower on the phone
    python export.py --model ViT-L-14 --runs 50        # any open_clip model; without --weights only to time it
    python export.py --iphone --team ID --bundle ID    # and the latency on a connected iPhone (macOS, Xcode)

The package takes an RGB `image` and returns `embedding` (1, D), L2-normalised, and with --labels `probabilities`
(1, C), both fp32. Conversion runs on Linux and macOS; only macOS and phones can run the result.
"""

import asyncio
import contextlib
import copy
import functools
import hashlib
import io
import json
import logging
import os
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dark
import evaluate
from dark import fail

log = logging.getLogger("coremltools")
log.setLevel(logging.ERROR)  # importing it warns of untested versions and, on Linux, of the missing Core ML framework
import coremltools as ct
from coremltools.models.compute_device import MLNeuralEngineComputeDevice
from coremltools.models.compute_plan import MLComputePlan
from coremltools.models.ml_program.experimental import perf_utils, remote_device

log.setLevel(logging.NOTSET)

# ---------------------------------------------------------------- command line

CHECKPOINT, PAPER, RANDOM = Path("out/student.pt"), "MobileCLIP2-S0", "Random weights, for timing only"


def parse_args(argv=None):
    parser = dark.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", nargs="?", help=f"of dark.py; default {CHECKPOINT}, else {PAPER} with random weights, for timing")
    add("--out", type=Path, default=Path("out/MobileFetalCLIP.mlpackage"), help="package to write; default %(default)s")
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="of weights and activations; default %(default)s")
    add("--labels", metavar="planes|brain|FILE", default="", help="adds probabilities; FILE: JSON class -> [prompts]")
    add("--runs", type=int, default=200, help="timed runs per latency; default %(default)s")
    add("--model", metavar="NAME", default="", help="any open_clip model, instead of a checkpoint")
    add("--weights", metavar="FILE|TAG", default="", help="weights of --model; without them random, for timing")
    add("--context-length", type=int, default=0, help="tokens of --model; 0: its own")
    add("--mean", default="", help="R,G,B of --model; default: what open_clip lists")
    add("--std", default="", help="R,G,B of --model; default: what open_clip lists")
    add("--iphone", action="store_true", help="time it on the connected iPhone too (macOS with Xcode)")
    add("--team", metavar="ID", default="", help="Apple development team for --iphone")
    add("--bundle", metavar="ID", default="", help="bundle identifier for --iphone's app, such as org.example.bench")
    args = parser.parse_args(argv)
    if args.checkpoint and args.model:
        fail(f"{args.checkpoint} with --model {args.model}: give a checkpoint or a model, not both")
    if not args.model and (args.weights or args.context_length or args.mean or args.std):
        fail("--weights, --context-length, --mean and --std belong to --model NAME; a checkpoint brings its own")
    if not args.iphone and (args.team or args.bundle):
        fail("--team and --bundle belong to --iphone")
    if args.runs < 1 or args.context_length < 0:
        fail(f"--runs {args.runs} must be at least 1, --context-length {args.context_length} at least 0")
    if args.out.suffix != ".mlpackage":
        fail(f"--out {args.out}: must end in .mlpackage")
    if args.out.exists() and not (args.out / "Manifest.json").is_file():
        fail(f"--out {args.out}: exists and is no Core ML package, so it is not replaced; choose another path")
    folder = next(path for path in args.out.absolute().parents if path.exists())  # what is missing below it is made
    if not (folder.is_dir() and os.access(folder, os.W_OK)):
        fail(f"--out {args.out}: {folder} is no folder that can be written to")
    return args


def read_labels(labels):
    """--labels -> class -> [prompts], or None."""
    if labels in ("", "planes", "brain"):
        return evaluate.PROMPTS.get(labels)
    prompts = {c: p for c, p in evaluate.read_prompts(labels).items() if c != "ga"}  # age templates are no class
    return prompts or fail(f"--labels {labels}: has no class -> [prompts]")


# ---------------------------------------------------------------- the model


def open_subject(args):
    """-> dark.Model in eval mode, and what the package's metadata shall tell of its weights."""
    path = Path(args.checkpoint or CHECKPOINT)
    if not args.model and (args.checkpoint or path.exists()):
        checkpoint = dark.load_checkpoint(path)
        model = dark.model_from_checkpoint(checkpoint)
        about = {"source": str(path), "epoch": f"{checkpoint['epoch']:g}"}
        about |= {key: str(checkpoint["config"][key]) for key in ("beta0", "r")}
    else:
        torch.manual_seed(0)
        name, path = args.model or PAPER, Path(args.weights)
        model = dark.open_model(name, args.weights, args.context_length, args.mean, args.std)
        model.clip.eval()
        about = {"source": args.weights or (name if ":" in name else RANDOM)}  # hf-hub:... brings its weights
    if path.is_file():
        about["checkpoint_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    hint = f", epoch {about['epoch']}" if "epoch" in about else "" if args.model else f" (there is no {CHECKPOINT})"
    print(f"{about['source']}: {model.name}, {model.size} x {model.size}{hint}")
    return model, about


class Phone(nn.Module):
    """What runs on the phone: (1, 3, S, S) pixels in 0..1 -> embedding (1, D), and probabilities (1, C) with labels.

    classes: (C, D) class text embeddings times the learned scale, or None.
    """

    def __init__(self, model, classes):
        super().__init__()
        self.visual = model.clip.visual
        self.register_buffer("mean", torch.tensor(model.mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(model.std).view(1, 3, 1, 1))
        self.register_buffer("classes", classes)
        self.eval().requires_grad_(False)

    def forward(self, image):
        features = self.visual((image - self.mean) / self.std)
        features = features[0] if isinstance(features, tuple) else features  # CoCa's towers also return tokens
        embedding = F.normalize(features, dim=-1)  # (1, D)
        if self.classes is None:
            return (embedding,)
        return embedding, F.linear(embedding, self.classes).softmax(-1)  # (1, D) x (D, C)


# ---------------------------------------------------------------- fusing

TOLERANCE, SPREAD = 1e-4, 1e-2  # largest relative difference that fusing may make; least distance of two embeddings


@torch.no_grad()
def livened(tower, images):
    """Draws layer scales and affine batch-norm parameters as if trained, in place, and takes the batch norms'
    statistics from the images: a fresh FastViT, whose layer scales are 1e-5, answers nearly the same to every image,
    and a comparison of such answers could not fail."""
    norms = [module for module in tower.modules() if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d))]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over what is seen
        norm.weight.uniform_(0.5, 1.5)
        norm.bias.normal_(0, 0.2)
    for module in tower.modules():
        if isinstance(getattr(module, "gamma", None), nn.Parameter):
            module.gamma.uniform_(0.1, 0.5)
    if norms:
        tower.train()(images)
    return tower.eval()


def probe_images(size):
    """(4, 3, S, S) pixels in 0..1: coloured blobs, coarse to fine, so that no two look alike to any tower."""
    draw = torch.Generator().manual_seed(0)
    return torch.cat([F.interpolate(torch.rand(1, 3, n, n, generator=draw), size=(size, size)) for n in (2, 4, 8, 32)])


@torch.no_grad()
def fuse(tower, images):
    """Merges training-time branches and their batch norms into single convolutions, which is exact.

    -> the fused copy, the largest relative change of an embedding, the smallest distance of two images' embeddings
    """
    fused = timm.utils.reparameterize_model(tower)
    before, after = tower(images)[0], fused(images)[0]  # (n, D), unit norm
    return fused, (before - after).norm(dim=1).max().item(), torch.pdist(before).min().item()


def fuse_and_check(tower, images):
    """-> the fused tower and the difference, or the tower itself and None where there is nothing to fuse, as in a ViT.

    Stops when fusing changes what the tower computes.
    """
    if timm.utils.reparameterize_model(tower).state_dict().keys() == tower.state_dict().keys():
        print("fused: nothing to fuse in this tower")
        return tower, None
    fused, difference, spread = fuse(tower, images)
    if not spread >= SPREAD:  # hardly trained: then fusing must also be right where a mistake would show
        _, on_livened, spread = fuse(livened(copy.deepcopy(tower), images), images)
        difference = max(difference, on_livened)
    print(f"fused: {len(images)} embeddings, at least {spread:.2g} apart, change by at most {difference:.1e} relative")
    if not spread >= SPREAD:
        fail(f"all images look alike to this model ({spread:.1e} apart), so fusing cannot be checked")
    if not difference <= TOLERANCE:
        fail(f"fusing changes an embedding by {difference:.1e} relative, more than {TOLERANCE:.0e}")
    return fused, difference


# ---------------------------------------------------------------- conversion


def no_bars():
    """coremltools draws progress bars and has no switch for them."""
    return mock.patch.object(tqdm, "__init__", functools.partialmethod(tqdm.__init__, disable=True))


@contextlib.contextmanager
def converting(name):
    """Turns what torch.export or coremltools cannot do with a tower into one line, which names the operation.

    They also print it, torch.export with whole graphs; that is silenced. Warnings of coremltools still show.
    """
    errors, torch_log = [], logging.getLogger("torch")
    keep = lambda record: record.levelno < logging.ERROR or errors.append(record.getMessage())  # append gives None
    level = torch_log.level
    log.addFilter(keep)
    torch_log.setLevel(logging.ERROR)
    try:
        with no_bars():
            yield
    except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        why = dark.one_line(" ".join([*errors, str(error)]))
        fail(f"{name}: its image tower cannot be converted to Core ML: {why}")
    finally:
        torch_log.setLevel(level)
        log.removeFilter(keep)


@torch.no_grad()
def convert(tower, name, size, precision, image_input=True):
    """Phone -> Core ML model, not loaded. image_input=False: `image` is a (1, 3, S, S) array in 0..1 instead."""
    shape = (1, 3, size, size)
    with converting(name), contextlib.redirect_stderr(io.StringIO()):
        program = torch.export.export(tower, (torch.zeros(shape),)).run_decompositions({})
    for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
        node.replace_all_uses_with(node.args[0])  # an identity that coremltools 9.0 does not know
        program.graph.erase_node(node)

    # In fp16 the norm of an embedding was 4e-4 off 1, and logits near 100 step by 0.06. So the head, which is what
    # Phone.forward does after the tower, stays in fp32: a few thousand operations.
    nodes = list(program.graph.nodes)
    last = max(i for i, node in enumerate(nodes) if len(node.meta.get("nn_module_stack", ())) > 1)  # in the tower
    head = {node.name for node in nodes[last + 1 :]}
    half = ct.transform.FP16ComputePrecision(op_selector=lambda operation: operation.name not in head)

    # One scale for all channels is all that ImageType does in an mlprogram; mean and std are in the graph.
    image = ct.ImageType(name="image", shape=shape, scale=1 / 255, color_layout=ct.colorlayout.RGB)
    array = ct.TensorType(name="image", shape=shape, dtype=np.float32)
    names = ("embedding",) if tower.classes is None else ("embedding", "probabilities")
    with converting(name):
        return ct.convert(
            program,
            inputs=[image if image_input else array],
            outputs=[ct.TensorType(name=output, dtype=np.float32) for output in names],
            minimum_deployment_target=ct.target.iOS17,
            compute_precision=half if precision == "fp16" else ct.precision.FLOAT32,
            skip_model_load=True,
        )


def describe(package, model, prompts, about):
    """Fills in what Xcode shows, and what an app can read: user metadata are strings, lists are JSON."""
    package.author = "dark, an implementation of arXiv 2603.05421"
    package.license = "MIT for the code; weights keep the licence of what they were trained from"
    package.short_description = f"Image tower of {model.name} for fetal ultrasound; source: {about['source']}"
    package.version = f"{dark.FORMAT} {about.get('checkpoint_sha256', about['source'])[:12]}"
    package.input_description["image"] = (
        f"RGB, {model.size} x {model.size}: zero-padded to a centred square, then resized ({model.interpolation}). "
        "Pixel values are scaled and normalised inside."
    )
    package.output_description["embedding"] = "L2-normalised image embedding"
    facts = about | {"mean": json.dumps(model.mean), "std": json.dumps(model.std), "interpolation": model.interpolation}
    if prompts:
        package.output_description["probabilities"] = f"softmax over {', '.join(prompts)} (`labels` in the metadata)"
        facts |= {"labels": json.dumps(list(prompts)), "prompts": json.dumps(prompts)}
    package.user_defined_metadata.update(facts)


def save(package, out):
    """Writes beside `out` and renames: an existing package is replaced only by a complete one. Returns its bytes."""
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        new = Path(folder) / out.name
        package.save(str(new))
        (new / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # 150 KB of the converter's debugging
        if out.exists():
            out.rename(Path(folder) / "replaced")
        new.rename(out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


# ---------------------------------------------------------------- cost


@torch.no_grad()
def count_macs(tower, size):
    """Multiply-accumulates of one image in units of 1e9, by kind."""
    # nn.MultiheadAttention's fast path is one opaque operation, which would count as nothing.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, size, size))
    torch.backends.mha.set_fastpath_enabled(fast)
    macs = {"convolutions": 0.0, "attention": 0.0, "matrix products": 0.0}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        name = str(operation)  # such as aten.convolution, aten._scaled_dot_product_flash_attention_for_cpu, aten.addmm
        kind = "convolutions" if "conv" in name else "attention" if "attention" in name else "matrix products"
        macs[kind] += flops / 2e9  # two operations for each multiply-accumulate
    return macs


WARM_UP = 10  # runs before the timed ones


@torch.inference_mode()
def cpu_latency(tower, image, runs, title):
    """Milliseconds of each run on one image."""
    samples = []
    for _ in tqdm(range(WARM_UP + runs), desc=title, unit="run", leave=False, disable=None):
        start = time.perf_counter()
        tower(image)
        samples.append(1e3 * (time.perf_counter() - start))
    return samples[WARM_UP:]


def cpu_name():
    if Path("/proc/cpuinfo").exists():
        named = re.search(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        return named[1] if named else platform.machine()
    if platform.system() == "Darwin":
        return subprocess.check_output(["sysctl", "-n", "machdep.cpu.brand_string"], text=True).strip()
    return platform.processor()


def latency_row(runtime, units, precision, samples, device="", system=""):
    """A row of the latency table, of this machine unless told otherwise."""
    median, p90 = np.percentile(samples, (50, 90)).round(3).tolist()
    where = {"runtime": runtime, "device": device or cpu_name(), "os": system or platform.platform(terse=True)}
    how = {"compute_units": units, "precision": precision}
    return where | how | {"median_ms": median, "p90_ms": p90, "runs": len(samples)}


# ---------------------------------------------------------------- Core ML on this Mac, and on a phone

UNITS = ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE")


async def coreml_latency(model, image, runs, device=None):
    """Milliseconds of each run; `device` is a prepared phone, or None for this Mac."""
    benchmarker = perf_utils.MLModelBenchmarker(model=model, device=device)
    await benchmarker.benchmark_predict(inputs={"image": image}, iterations=WARM_UP)  # its own warm-up is one run
    return (await benchmarker.benchmark_predict(inputs={"image": image}, iterations=runs)).samples


def neural_engine_share(model):
    """Share of the program's operations, constants aside, that Core ML prefers to run on the Neural Engine."""
    plan = MLComputePlan.load_from_path(model.get_compiled_model_path(), compute_units=model.compute_unit)
    operations = plan.model_structure.program.functions["main"].block.operations
    operations = [operation for operation in operations if "const" not in operation.operator_name]
    usages = filter(None, map(plan.get_compute_device_usage_for_mlprogram_operation, operations))
    chosen = [isinstance(usage.preferred_compute_device, MLNeuralEngineComputeDevice) for usage in usages]
    return sum(chosen) / len(chosen) if chosen else 0.0


def on_this_mac(out, tower, pixels, args):
    """A row per choice of compute units: latency, difference to PyTorch's embedding, share of the Neural Engine."""
    image, rows = Image.fromarray(pixels.numpy()), []
    with torch.no_grad():
        expected = tower(pixels.permute(2, 0, 1)[None] / 255)[0].numpy()
    for units in tqdm(UNITS, desc="Core ML", leave=False, disable=None):
        model = ct.models.MLModel(str(out), compute_units=ct.ComputeUnit[units])
        samples = asyncio.run(coreml_latency(model, image, args.runs))
        difference = float(np.abs(model.predict({"image": image})["embedding"] - expected).max())
        checks = {"difference": difference, "neural_engine_share": neural_engine_share(model)}
        rows.append(latency_row("Core ML", units, args.precision, samples) | checks)
    return rows


def find_iphone(args):
    """-> the connected iPhone; each thing that is missing gets a line that says what to do."""
    if platform.system() != "Darwin":
        fail(f"--iphone: needs macOS with Xcode, and this is {platform.system()}; run the same command on a Mac")
    if not (args.team and args.bundle):
        fail("--iphone: needs --team ID (developer.apple.com, Membership) and --bundle ID (such as org.example.bench)")
    if not shutil.which("xcodebuild"):
        fail("--iphone: no xcodebuild; install Xcode, then sudo xcode-select -s /Applications/Xcode.app")
    if not shutil.which("devicectl"):  # coremltools calls it both through xcrun and directly
        fail('--iphone: devicectl is not on PATH; export PATH="$PATH:$(dirname "$(xcrun --find devicectl)")"')
    try:
        phones = remote_device.Device.get_connected_devices(remote_device.DeviceType.IPHONE)
    except remote_device._DeviceCtlError as error:
        fail(f"--iphone: devicectl fails ({dark.one_line(error)}); start Xcode once and let it finish installing")
    if not phones:
        fail("--iphone: no connected iPhone; plug it in, unlock it, trust this Mac; see xcrun devicectl list devices")
    if phones[0].developer_mode_state != "enabled":
        fail(f"--iphone: {phones[0].name} is not in Developer Mode; Settings > Privacy & Security > Developer Mode")
    return phones[0]


async def on_iphone(phone, tower, model, pixels, args):
    """A row per choice of compute units. coremltools 9.0 cannot send an image: what is timed is a twin of the package
    that takes an array, inside coremltools' benchmark app, which is built, installed and started first."""
    twin = convert(tower, model.name, model.size, args.precision, image_input=False)
    image = (pixels.permute(2, 0, 1)[None] / 255).numpy()  # (1, 3, S, S) fp32
    credentials = remote_device.AppSigningCredentials(development_team=args.team, bundle_identifier=args.bundle)
    print(f"timing on {phone.name}: every run is a request over devicectl; keep the phone unlocked")
    rows = []
    try:
        with no_bars(), tempfile.TemporaryDirectory() as folder:
            ready = await phone.prepare_for_model_debugging(credentials=credentials, working_directory=Path(folder))
            for units in UNITS:
                where = dict(weights_dir=twin.weights_dir, compute_units=ct.ComputeUnit[units], skip_model_load=True)
                samples = await coreml_latency(ct.models.MLModel(twin.get_spec(), **where), image, args.runs, ready)
                system = f"iOS {phone.os_version}"
                rows.append(latency_row("Core ML", units, args.precision, samples, phone.name, system))
            ready.session.stop()
    except (ValueError, RuntimeError, remote_device._DeviceCtlError, remote_device._AppBuilder.Error) as error:
        fail(f"--iphone: {dark.one_line(error)}; unlock the phone, keep it awake, check --team and --bundle in Xcode")
    return rows


# ---------------------------------------------------------------- report


def report(result, out):
    """Prints the latency table and writes export.json beside the package."""
    cells = [["runtime", "device", "OS", "compute units", "precision", "median ms", "p90 ms"]]
    for r in result["latency"]:
        where = [r[key] for key in ("runtime", "device", "os", "compute_units", "precision")]
        cells.append([*where, f"{r['median_ms']:.2f}", f"{r['p90_ms']:.2f}"])
    print(evaluate.aligned(cells, left=5))
    for r in result["latency"]:
        if "difference" in r:
            share = f"{r['neural_engine_share']:.0%} of the operations prefer the Neural Engine"
            print(f"{r['compute_units']}: at most {r['difference']:.1e} from PyTorch's embedding; {share}")
    text = json.dumps(result, indent=2) + "\n"
    path = out.with_name("export.json")
    dark.write_atomically(path, lambda temporary: temporary.write_text(text))
    print(f"wrote {path}")


def main(argv=None):
    args = parse_args(argv)
    phone = find_iphone(args) if args.iphone else None
    prompts = read_labels(args.labels)
    start = time.perf_counter()
    torch.set_num_threads(1)  # other work on the machine disturbs one thread least, so the latencies repeat
    model, about = open_subject(args)
    images = probe_images(model.size)
    with torch.no_grad():  # (C, D)
        classes = model.clip.logit_scale.exp() * evaluate.class_embeddings(model, prompts) if prompts else None
    trained = Phone(model, classes)
    if about["source"] == RANDOM:
        livened(trained, images)
    fused, difference = fuse_and_check(trained, images)
    package = convert(fused, model.name, model.size, args.precision)
    describe(package, model, prompts, about)
    size, seconds = save(package, args.out), time.perf_counter() - start

    before, after = (sum(p.numel() for p in tower.visual.parameters()) for tower in (trained, fused))
    macs = count_macs(fused, model.size)
    kinds = ", ".join(f"{kind} {count:.3g}" for kind, count in macs.items())
    print(f"parameters: {after / 1e6:.2f} M in the image tower ({before / 1e6:.2f} M before fusing)")
    print(f"GMACs: {sum(macs.values()):.3g}, multiply-accumulates of one image through the fused tower: {kinds}")
    print(f"package: {args.out}, {args.precision}, {size / 1e6:.2f} MB on disk, made in {seconds:.0f} s")

    pixels = (images[3] * 255).round().byte().permute(1, 2, 0).contiguous()  # (S, S, 3) uint8
    image = (pixels / 255).permute(2, 0, 1)[None]  # (1, 3, S, S), channels last in memory
    branched = fused is not trained
    towers = {"PyTorch unfused": trained, "PyTorch fused": fused} if branched else {"PyTorch": fused}
    latency = []
    for runtime, tower in towers.items():
        tower.to(memory_format=torch.channels_last)  # in which the fused tower is fastest
        latency.append(latency_row(runtime, "CPU, 1 thread", "fp32", cpu_latency(tower, image, args.runs, runtime)))
    if platform.system() == "Darwin":
        latency += on_this_mac(args.out, fused, pixels, args)
    result = {
        "model": model.name,
        "source": about["source"],
        "package": str(args.out),
        "precision": args.precision,
        "input_size": model.size,
        "labels": list(prompts or []),
        "visual_params": after,
        "visual_params_unfused": before,
        "fuse_difference": difference,
        "gmacs": sum(macs.values()),
        "gmacs_by_kind": macs,
        "package_mb": size / 1e6,
        "export_seconds": seconds,
        "fused_over_unfused": latency[1]["median_ms"] / latency[0]["median_ms"] if branched else None,
        "latency": latency,
    }
    report(result, args.out)
    if phone:
        latency += asyncio.run(on_iphone(phone, fused, model, pixels, args))
        report(result, args.out)


if __name__ == "__main__":
    main()
