"""Put the image tower on a phone: checkpoint -> fused -> Core ML package -> latency table (the paper's Table 2).

    python export.py                                   # out/student.pt -> out/MobileFetalCLIP.mlpackage
    python export.py --labels planes                   # and zero-shot probabilities, with no text tower on the phone
    python export.py --model ViT-L-14 --runs 50        # any open_clip model -> out/ViT-L-14.mlpackage, out/ViT-L-14.json
    python export.py --iphone --team ID --bundle ID    # and the latency on a connected iPhone (macOS, Xcode)

The package takes an RGB `image` and returns `embedding` (1, D), L2-normalised, and with --labels `probabilities`
(1, C), both fp32. Conversion runs on Linux and macOS; only macOS and phones can run the result.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal
from unittest import mock

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import dark
import evaluate
from dark import fail

# coremltools warns of untested versions and, on Linux, of the missing Core ML framework; torch.export logs whole graphs.
for library in ("coremltools", "torch"):
    logging.getLogger(library).setLevel(logging.ERROR)
import coremltools as ct
from coremltools.models.compute_device import MLNeuralEngineComputeDevice
from coremltools.models.compute_plan import MLComputePlan
from coremltools.models.ml_program.experimental import perf_utils, remote_device

CHECKPOINT, PAPER, RANDOM = "out/student.pt", "MobileCLIP2-S0", "Random weights, for timing only"
WARM_UP = 10  # runs before the timed ones
CPU = "sysctl -n machdep.cpu.brand_string || grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2"  # macOS || Linux
CONVOLUTION, ATTENTION = torch.ops.aten.convolution, torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
PHONE_ERRORS = (ValueError, RuntimeError, remote_device._DeviceCtlError, remote_device._AppBuilder.Error)


@dataclass
class Options:
    """Every setting; `python export.py --help` is made from these lines."""

    checkpoint: str = field(default="", metadata={"positional": "?"})  # empty: out/student.pt, else random weights
    out: str = ""  # package to write; empty: out/MobileFetalCLIP.mlpackage, and with --model out/NAME.mlpackage
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


def parse_args(argv=None):
    """-> Options, the package to write, and its report: export.json beside it; but what --model writes without --out
    has the model's name, both files, and replaces nothing of the trained model's."""
    args = Options(**dark.given(Options, argv, __doc__))
    if args.checkpoint and args.model:
        fail(f"{args.checkpoint} with --model {args.model}: give a checkpoint or a model, not both")
    if not args.model and (args.weights or args.context_length or args.mean or args.std or args.interpolation):
        fail("--weights, --context-length, --mean, --std, --interpolation belong to --model; a checkpoint has its own")
    if len({args.iphone, bool(args.team), bool(args.bundle)}) > 1:
        fail("--iphone, --team ID (developer.apple.com, Membership) and --bundle ID (org.example.bench) go together")
    if args.runs < 1:
        fail(f"--runs {args.runs}: must be at least 1")
    name = re.sub(r"[^\w.-]+", "-", args.model) or "MobileFetalCLIP"
    out = Path(args.out or f"out/{name}.mlpackage")
    if out.suffix != ".mlpackage" or (out.exists() and not (out / "Manifest.json").is_file()):
        fail(f"--out {out}: must end in .mlpackage, and only a Core ML package is replaced; choose another path")
    with dark.words(f"--out {out}: cannot be written"):  # below the first folder that exists the others are made
        tempfile.TemporaryFile(dir=next(path for path in out.absolute().parents if path.exists())).close()
    return args, out, out.with_suffix(".json") if args.model and not args.out else out.with_name("export.json")


def open_subject(args):
    """-> dark.Model in eval mode, and what the package's metadata shall tell of its weights."""
    if not args.model and (args.checkpoint or Path(CHECKPOINT).exists()):
        path = args.checkpoint or CHECKPOINT
        checkpoint = dark.load_checkpoint(path)
        model, cfg = dark.model_from_checkpoint(checkpoint), checkpoint["config"]
        about = {"source": path, "epoch": f"{checkpoint['epoch']:g}", "beta0": str(cfg["beta0"]), "r": str(cfg["r"])}
    else:
        torch.manual_seed(0)
        name, path = args.model or PAPER, args.weights
        model = dark.open_model(name, path, args.context_length)
        evaluate.set_preprocessing(model, args.mean, args.std, args.interpolation)
        about = {"source": path or (name if ":" in name else RANDOM)}  # hf-hub:... brings its weights
    if Path(path).is_file():
        about["checkpoint_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    epoch = f", epoch {about['epoch']}" if "epoch" in about else ""
    print(f"{about['source']}: {model.name}, {model.size} x {model.size}{epoch}")
    return model.eval(), about


class Phone(torch.nn.Module):
    """What runs on the phone: (1, 3, S, S) pixels in 0..1 -> embedding (1, D), and with `classes`, (C, D) class text
    embeddings times the learned scale, probabilities (1, C)."""

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


def probe_images(size):
    """(4, 3, S, S) pixels in 0..1 of 8 bits: coloured blobs, coarse to fine, so that no two look alike to any tower."""
    draw = torch.Generator().manual_seed(0)
    blobs = [F.interpolate(torch.rand(1, 3, n, n, generator=draw), size=(size, size)) for n in (2, 4, 8, 32)]
    return (torch.cat(blobs) * 255).round() / 255


def fuse(tower, images):
    """Merges training-time branches and their batch norms into single convolutions, and checks that nothing changes.

    In fp64 a right merge changes 1e-11 of the distance between two images or less, a wrong one 1e-2, also in a fresh
    FastViT, which answers nearly the same to every image: there fp32 could not tell them apart. -> the fused copy and
    the largest change of an embedding, or the tower itself and None where there is nothing to fuse, as in a ViT.
    """
    if not tower(images)[0].isfinite().all():
        fail("an image's embedding is not finite: these weights are of no use")
    if timm.utils.reparameterize_model(tower).state_dict().keys() == tower.state_dict().keys():
        print("fused: nothing to fuse in this tower")
        return tower, None
    fused, images = timm.utils.reparameterize_model(tower.double()), images.double()
    before, after = tower(images)[0], fused(images)[0]  # (n, D), unit norm
    tower.float()  # to the bit as it was
    change, apart = (before - after).norm(dim=1).max().item(), torch.pdist(before).min().item()
    print(f"fused: {len(images)} embeddings, at least {apart:.2g} apart, change by at most {change:.1e}")
    if not change < 1e-9 * apart:
        fail(f"fusing changes an embedding by {change:.1e}, or all images look alike to the model ({apart:.1e} apart)")
    return fused.float(), change


# ---------------------------------------------------------------- the package


def convert(tower, name, size, precision, image_input=True):
    """Phone -> Core ML model, not loaded. image_input=False: `image` is a (1, 3, S, S) array in 0..1 instead."""
    shape = (1, 3, size, size)
    # One scale for all channels is all that ImageType does in an mlprogram; mean and std are in the graph.
    image = ct.ImageType(name="image", shape=shape, scale=1 / 255, color_layout=ct.colorlayout.RGB)
    array = ct.TensorType(name="image", shape=shape, dtype=np.float32)
    names = ("embedding",) if tower.classes is None else ("embedding", "probabilities")
    outputs = [ct.TensorType(name=output, dtype=np.float32) for output in names]
    how = {"minimum_deployment_target": ct.target.iOS17, "skip_model_load": True}
    words = dark.words(f"{name}: its image tower cannot be converted to Core ML")
    with words, contextlib.redirect_stderr(io.StringIO()):  # progress bars, which have no switch
        program = torch.export.export(tower, (torch.zeros(shape),)).run_decompositions({})
        for node in program.graph.find_nodes(op="call_function", target=torch.ops.aten.alias.default):
            node.replace_all_uses_with(node.args[0])  # an identity that coremltools 9.0 does not know
            program.graph.erase_node(node)
        # In fp16 the norm of an embedding was 4e-4 off 1, and logits near 100 step by 0.06. So the head, which is
        # what Phone.forward does after the tower, stays in fp32: a few thousand operations.
        nodes = list(program.graph.nodes)
        last = max(i for i, node in enumerate(nodes) if len(node.meta.get("nn_module_stack", ())) > 1)
        head = {node.name for node in nodes[last + 1 :]}
        half = ct.transform.FP16ComputePrecision(op_selector=lambda operation: operation.name not in head)
        how["compute_precision"] = half if precision == "fp16" else ct.precision.FLOAT32
        return ct.convert(program, inputs=[image if image_input else array], outputs=outputs, **how)


def save(package, out, model, prompts, about):
    """Writes the package with what Xcode shows and an app can read (strings; lists as JSON). An existing one is
    replaced by a rename, when the new one is complete. -> its bytes"""
    package.author = "dark, an implementation of arXiv 2603.05421"
    package.license = "MIT for the code; weights keep the licence of what they were trained from"
    package.short_description = f"Image tower of {model.name} for fetal ultrasound; source: {about['source']}"
    package.version = f"{dark.FORMAT} {about.get('checkpoint_sha256', about['source'])[:12]}"
    how = f"zero-padded to a centred square, then resized ({model.interpolation}); scaled and normalised inside"
    package.input_description["image"] = f"RGB, {model.size} x {model.size}: {how}"
    package.output_description["embedding"] = "L2-normalised image embedding"
    facts = about | {"mean": json.dumps(model.mean), "std": json.dumps(model.std), "interpolation": model.interpolation}
    if prompts:
        package.output_description["probabilities"] = f"softmax over {', '.join(prompts)} (`labels` in the metadata)"
        facts |= {"labels": json.dumps(list(prompts)), "prompts": json.dumps(prompts)}
    package.user_defined_metadata.update(facts)

    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        new = Path(folder) / out.name
        package.save(str(new))
        (new / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # 150 KB of the converter's debugging
        if out.exists():
            out.rename(Path(folder) / "replaced")
        new.rename(out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


# ---------------------------------------------------------------- cost and latency


def count_macs(tower, size):
    """Multiply-accumulates of one image in units of 1e9, by kind."""
    # Two would count as nothing: nn.MultiheadAttention's fast path, one opaque operation, and the fused attention of a
    # CPU, for which torch 2.6 has no formula.
    slow = mock.patch.object(torch.backends.mha, "get_fastpath_enabled", return_value=False)
    formula = {ATTENTION: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}
    with slow, FlopCounterMode(display=False, custom_mapping=formula) as counter:
        tower(torch.zeros(1, 3, size, size))
    flops = dict(counter.get_flop_counts()["Global"])
    convolutions, attention = flops.pop(CONVOLUTION, 0), flops.pop(ATTENTION, 0)
    kinds = {"convolutions": convolutions, "attention": attention, "matrix products": sum(flops.values())}
    return {kind: count / 2e9 for kind, count in kinds.items()}  # a multiply-accumulate is two operations


def latency_row(runtime, units, precision, milliseconds, phone=None):
    """A row of the latency table, of the phone or of this machine."""
    cpu = subprocess.run(CPU, shell=True, capture_output=True, text=True).stdout.strip() or platform.machine()
    device, system = (phone.name, f"iOS {phone.os_version}") if phone else (cpu, platform.platform(terse=True))
    median, p90 = np.percentile(milliseconds, (50, 90)).round(3).tolist()
    where = {"runtime": runtime, "device": device, "os": system, "compute_units": units, "precision": precision}
    return where | {"median_ms": median, "p90_ms": p90, "runs": len(milliseconds)}


def find_iphone():
    """-> the connected iPhone; what is missing gets a line that says what to do."""
    with dark.words("--iphone needs macOS, Xcode started once, devicectl (xcrun --find) on PATH", errors=PHONE_ERRORS):
        phones = remote_device.Device.get_connected_devices(remote_device.DeviceType.IPHONE)
    ready = [phone for phone in phones if phone.developer_mode_state == "enabled"]
    if not ready:
        found = ", ".join(phone.name for phone in phones) or "none"
        fail(f"--iphone: no iPhone in Developer Mode (connected: {found}); plug it in, unlock it, trust this Mac")
    return ready[0]


async def on_core_ml(package, image, args, expected=None, phone=None):
    """A row per choice of compute units: of the phone, in coremltools' benchmark app, which is built and started
    first; else of this Mac, with the difference to PyTorch and the operations' share that prefers the Neural Engine."""
    rows = []
    if phone:
        credentials = remote_device.AppSigningCredentials(development_team=args.team, bundle_identifier=args.bundle)
        phone = await phone.prepare_for_model_debugging(credentials=credentials)
    for units in ("CPU_ONLY", "CPU_AND_GPU", "CPU_AND_NE"):
        model = ct.models.MLModel(package, compute_units=ct.ComputeUnit[units], skip_model_load=bool(phone))
        benchmarker = perf_utils.MLModelBenchmarker(model=model, device=phone)
        await benchmarker.benchmark_predict(inputs={"image": image}, iterations=WARM_UP)  # its own is one run
        timed = await benchmarker.benchmark_predict(inputs={"image": image}, iterations=args.runs)
        rows.append(latency_row("Core ML", units, args.precision, timed.samples, phone))
        if not phone:
            rows[-1]["difference"] = float(np.abs(model.predict({"image": image})["embedding"] - expected).max())
            plan = MLComputePlan.load_from_path(model.get_compiled_model_path(), compute_units=model.compute_unit)
            operations = plan.model_structure.program.functions["main"].block.operations
            computed = [operation for operation in operations if "const" not in operation.operator_name]
            usages = filter(None, map(plan.get_compute_device_usage_for_mlprogram_operation, computed))
            engine = [isinstance(usage.preferred_compute_device, MLNeuralEngineComputeDevice) for usage in usages]
            rows[-1]["neural_engine_share"] = sum(engine) / max(len(engine), 1)
    if phone:
        phone.session.stop()
    return rows


def report(result, path):
    """Prints the result, the latencies as a table, and writes it as JSON."""
    rows, show = result["latency"], lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    for key, value in result.items():
        print(f"{key:24}{show(value)}" if key != "latency" else "")
    columns = list(dict.fromkeys(key for row in rows for key in row))  # a Mac's rows have more
    print(evaluate.aligned([columns, *[[show(row.get(key, "")) for key in columns] for row in rows]], left=5))
    dark.write_atomically(path, json.dumps(result, indent=2).encode() + b"\n")
    print(f"wrote {path}")


@torch.no_grad()
@dark.words(errors=dark.MAIN_ERRORS)
def main(argv=None):
    args, out, report_path = parse_args(argv)
    phone = find_iphone() if args.iphone else None
    prompts = evaluate.PROMPTS[args.labels] if args.labels in ("planes", "brain") else {}
    if args.labels and not prompts:
        found = evaluate.read_prompts(args.labels).items()  # and, it may be, age templates
        prompts = {c: texts for c, texts in found if c != "ga"} or fail(f"--labels {args.labels}: has no class")
    start = timeit.default_timer()
    torch.set_num_threads(1)  # other work on the machine disturbs one thread least, so the latencies repeat
    model, about = open_subject(args)
    images = probe_images(model.size)
    classes = model.clip.logit_scale.exp() * evaluate.class_embeddings(model, prompts) if prompts else None  # (C, D)
    trained = Phone(model, classes)
    fused, change = fuse(trained, images)
    package = convert(fused, model.name, model.size, args.precision)
    size, seconds = save(package, out, model, prompts, about), timeit.default_timer() - start
    macs = count_macs(fused, model.size)

    towers = {"PyTorch": fused} if change is None else {"PyTorch unfused": trained, "PyTorch fused": fused}
    latency, image = [], images[3:].to(memory_format=torch.channels_last)
    for runtime, tower in towers.items():
        print(f"timing {args.runs} runs on one thread: {runtime}")
        tower.to(memory_format=torch.channels_last)  # in which the fused tower is fastest
        timed = timeit.repeat(lambda: tower(image), number=1, repeat=WARM_UP + args.runs)[WARM_UP:]
        latency.append(latency_row(runtime, "CPU, 1 thread", "fp32", [1e3 * s for s in timed]))
    ratio = None if change is None else latency[1]["median_ms"] / latency[0]["median_ms"]
    if platform.system() == "Darwin":
        picture = Image.fromarray((image[0] * 255).round().byte().permute(1, 2, 0).numpy())
        latency += asyncio.run(on_core_ml(str(out), picture, args, expected=fused(image)[0].numpy()))
    before, after = (sum(p.numel() for p in tower.visual.parameters()) for tower in (trained, fused))
    result = {"model": model.name, "source": about["source"], "package": str(out), "precision": args.precision}
    result |= {"input_size": model.size, "labels": list(prompts), "package_mb": size / 1e6, "export_seconds": seconds}
    result |= {"visual_params": after, "visual_params_unfused": before, "fuse_difference": change}
    result |= {"gmacs": sum(macs.values()), "gmacs_by_kind": macs, "fused_over_unfused": ratio, "latency": latency}
    report(result, report_path)
    if phone:  # coremltools 9.0 cannot send it an image: what is timed is a twin of the package that takes an array
        twin = convert(fused, model.name, model.size, args.precision, image_input=False)
        with dark.words("--iphone: unlock the phone, check --team and --bundle in Xcode", errors=PHONE_ERRORS):
            latency += asyncio.run(on_core_ml(twin.package_path, images[3:].numpy(), args, phone=phone))
        report(result, report_path)


if __name__ == "__main__":
    main()
