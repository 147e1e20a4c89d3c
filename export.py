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

import numpy as np
import timm
import torch
import torch.nn.functional as F
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from tqdm import tqdm

import dark
import evaluate
from dark import fail

# coremltools warns of untested versions and, on Linux, of the missing Core ML framework; torch.export logs whole graphs.
logging.disable(logging.WARNING)
import coremltools as ct
from coremltools.models.compute_device import MLNeuralEngineComputeDevice
from coremltools.models.ml_program.experimental import perf_utils, remote_device

WARM_UP = 10  # runs before the timed ones
CPU_NAME = "sysctl -n machdep.cpu.brand_string || grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2"  # macOS, Linux


@dataclass
class Options:
    """Every setting; `python export.py --help` is made from these lines."""

    checkpoint: tuple[str, ...] = field(default=(), metadata={"positional": "*"})  # of dark.py; none: out/student.pt
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
    """-> Options, the package to write, and the file for its report."""
    args = Options(**dark.given(Options, argv, __doc__))
    if len(args.checkpoint) + bool(args.model) > 1:
        fail(f"{' '.join(args.checkpoint)} {args.model}: give one checkpoint or one --model")
    if not args.model and (args.weights or args.context_length or args.mean or args.std or args.interpolation):
        fail("--weights, --context-length, --mean, --std, --interpolation belong to --model; a checkpoint has its own")
    if len({args.iphone, bool(args.team), bool(args.bundle)}) > 1:
        fail("--iphone, --team ID (developer.apple.com, Membership) and --bundle ID (org.example.bench) go together")
    if args.runs < 1:
        fail(f"--runs {args.runs}: must be at least 1")
    name = re.sub(r"[^\w.-]+", "-", args.model)  # local-dir:/a/b -> local-dir-a-b
    out = Path(args.out or f"out/{name or 'MobileFetalCLIP'}.mlpackage")
    if out.suffix != ".mlpackage" or (out.exists() and not (out / "Manifest.json").is_file()):
        fail(f"--out {out}: must end in .mlpackage, and only a Core ML package is replaced; choose another path")
    with dark.user_error(f"--out {out}: cannot be written"):
        out.parent.mkdir(parents=True, exist_ok=True)
    # What --model writes by default replaces nothing of the trained model's.
    return args, out, out.with_suffix(".json") if args.model and not args.out else out.with_name("export.json")


def open_subject(args):
    """-> dark.Model in eval mode, and what the package's metadata shall tell of its weights."""
    if args.model:
        torch.manual_seed(0)
        model, path = dark.open_model(args.model, args.weights, args.context_length), args.weights
        evaluate.set_preprocessing(model, args.mean, args.std, args.interpolation)
        about = {"source": path or (args.model if ":" in args.model else "Random weights, for timing only")}
    else:
        (path,) = args.checkpoint or ("out/student.pt",)
        checkpoint = dark.load_checkpoint(path)
        model, cfg = dark.model_from_checkpoint(checkpoint), checkpoint["config"]
        about = {"source": path, "epoch": f"{checkpoint['epoch']:g}", "beta0": str(cfg["beta0"]), "r": str(cfg["r"])}
    if Path(path).is_file():
        about["checkpoint_sha256"] = hashlib.sha256(Path(path).read_bytes()).hexdigest()
    print(f"{about['source']}: {model.name}, {model.size} x {model.size}")
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


def fuse(tower, images):
    """Merges training-time branches and their batch norms into single convolutions, and checks that nothing changes.
    In fp64 a right merge changes 1e-11 of the distance between two images or less, a wrong one 1e-2, also in a fresh
    FastViT, which answers nearly the same to every image: there fp32 could not tell them apart. -> the fused copy and
    the largest change of an embedding, or the tower itself and None where there is nothing to fuse, as in a ViT."""
    if timm.utils.reparameterize_model(tower).state_dict().keys() == tower.state_dict().keys():
        return tower, None
    fused, images = timm.utils.reparameterize_model(tower.double()), images.double()
    before, after = tower(images)[0], fused(images)[0]  # (n, D), unit norm
    tower.float()  # to the bit as it was
    change, apart = (before - after).norm(dim=1).max().item(), torch.pdist(before).min().item()
    if not change < 1e-9 * apart:
        fail(f"fusing changes an embedding by {change:.1e}, or all images look alike to the model ({apart:.1e} apart)")
    return fused.float(), change


def convert(tower, name, image, precision):
    """Phone -> Core ML model, not loaded. image: type of the input `image`, a picture or a (1, 3, S, S) array in 0..1."""
    names = ("embedding",) if tower.classes is None else ("embedding", "probabilities")
    outputs = [ct.TensorType(name=output, dtype=np.float32) for output in names]
    with dark.user_error(f"{name}: cannot be converted to Core ML"), contextlib.redirect_stderr(io.StringIO()):  # bars
        identity = {torch.ops.aten.alias.default: lambda x: x}  # which coremltools 9.0 does not know
        program = torch.export.export(tower, (torch.zeros(image.shape.shape),)).run_decompositions(identity)
        # In fp16 the norm of an embedding was 4e-4 off 1, and logits near 100 step by 0.06. So the head, which is
        # what Phone.forward does after the tower, stays in fp32: a few thousand operations.
        nodes = list(program.graph.nodes)
        last = max(i for i, node in enumerate(nodes) if len(node.meta.get("nn_module_stack", ())) > 1)
        head = {node.name for node in nodes[last + 1 :]}
        half = ct.transform.FP16ComputePrecision(op_selector=lambda operation: operation.name not in head)
        how = {"compute_precision": half if precision == "fp16" else ct.precision.FLOAT32, "skip_model_load": True}
        how["minimum_deployment_target"] = ct.target.iOS17
        return ct.convert(program, inputs=[image], outputs=outputs, **how)


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
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        new = Path(folder) / out.name
        package.save(str(new))
        (new / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # 150 KB of the converter's debugging
        if out.exists():
            out.rename(Path(folder) / "replaced")
        new.rename(out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


def count_macs(tower, image):
    """Multiply-accumulates of one image (1, 3, S, S) in units of 1e9, by kind."""
    # nn.MultiheadAttention's fast path and the fused attention of a CPU have no formula: they would count as nothing.
    torch.backends.mha.set_fastpath_enabled(False)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        tower(image)
    torch.backends.mha.set_fastpath_enabled(True)
    flops = dict(counter.get_flop_counts()["Global"])
    convolutions, attention = (flops.pop(kind, 0) for kind in (torch.ops.aten.convolution, torch.ops.aten.bmm))
    kinds = {"convolutions": convolutions, "attention": attention, "matrix products": sum(flops.values())}
    return {kind: count / 2e9 for kind, count in kinds.items()}  # a multiply-accumulate is two operations


def latency_row(runtime, units, precision, milliseconds, phone=None):
    """A row of the latency table, of the phone or of this machine."""
    cpu = subprocess.run(CPU_NAME, shell=True, capture_output=True, text=True).stdout.strip() or platform.machine()
    device, system = (phone.name, f"iOS {phone.os_version}") if phone else (cpu, platform.platform(terse=True))
    median, p90 = np.percentile(milliseconds, (50, 90)).round(3).tolist()
    where = {"runtime": runtime, "device": device, "os": system, "compute_units": units, "precision": precision}
    return where | {"median_ms": median, "p90_ms": p90, "runs": len(milliseconds)}


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
        timed = await benchmarker.benchmark_predict(inputs={"image": image}, iterations=WARM_UP + args.runs)
        rows.append(latency_row("Core ML", units, args.precision, timed.samples[WARM_UP:], phone))
        if not phone:
            rows[-1]["difference"] = float(np.abs(model.predict({"image": image})["embedding"] - expected).max())
            operations = await benchmarker.benchmark_operation_execution(inputs={"image": image})
            usages = [o.compute_device_usage for o in operations if o.compute_device_usage and o.spec.type != "const"]
            engine = [isinstance(usage.preferred_compute_device, MLNeuralEngineComputeDevice) for usage in usages]
            rows[-1]["neural_engine_share"] = sum(engine) / max(len(engine), 1)
    if phone:
        phone.session.stop()
    return rows


def report(result, path):
    """Writes the result as JSON, then prints it, the latencies as a table."""
    dark.write_atomically(path, json.dumps(result, indent=2).encode() + b"\n")
    rows, show = result["latency"], lambda value: f"{value:.4g}" if isinstance(value, float) else str(value)
    for key, value in result.items():
        print(f"{key:24}{show(value)}" if key != "latency" else "")
    columns = list(dict.fromkeys(key for row in rows for key in row))  # a Mac's rows have more
    print(evaluate.aligned([columns, *[[show(row.get(key, "")) for key in columns] for row in rows]], left=5))
    print(f"wrote {path}")


@torch.no_grad()
@dark.script()
def main(argv=None):
    args, out, report_path = parse_args(argv)
    prompts = {}
    if args.labels:
        ours = args.labels in ("planes", "brain")
        found = evaluate.PROMPTS[args.labels] if ours else evaluate.read_prompts(args.labels)
        prompts = {name: texts for name, texts in found.items() if name != "ga"}  # age templates are no class
        prompts or fail(f"--labels {args.labels}: has no class")
    if args.iphone:
        with dark.user_error("--iphone: needs macOS, Xcode started once, devicectl (xcrun --find) on PATH"):
            phones = remote_device.Device.get_connected_devices(remote_device.DeviceType.IPHONE)
        phones or fail("--iphone: none is connected; plug it in, unlock it, let it trust this Mac")
    start = timeit.default_timer()
    torch.set_num_threads(1)  # other work on the machine disturbs one thread least, so the latencies repeat
    model, about = open_subject(args)
    shape, draw = (1, 3, model.size, model.size), torch.Generator().manual_seed(0)
    blobs = F.interpolate(torch.rand(4, 3, 8, 8, generator=draw), shape[2:])  # no two look alike to any tower
    images = (blobs * 255).round() / 255  # (4, 3, S, S)
    if not Phone(model, None)(images)[0].isfinite().all():
        fail(f"{about['source']}: an image's embedding is not finite: these weights are of no use")
    classes = model.clip.logit_scale.exp() * evaluate.class_embeddings(model, prompts) if prompts else None  # (C, D)
    trained = Phone(model, classes)
    fused, change = fuse(trained, images)
    # One scale for all channels is all that ImageType does in an mlprogram; mean and std are in the graph.
    picture = ct.ImageType(name="image", shape=shape, scale=1 / 255, color_layout=ct.colorlayout.RGB)
    package = convert(fused, model.name, picture, args.precision)
    size, seconds = save(package, out, model, prompts, about), timeit.default_timer() - start
    image = images[3:].to(memory_format=torch.channels_last)  # in which the fused tower is fastest
    macs, latency = count_macs(fused, image), []
    towers = {"PyTorch": fused} if change is None else {"PyTorch unfused": trained, "PyTorch fused": fused}
    for runtime, tower in tqdm(towers.items(), f"timing {args.runs} runs", leave=False, disable=None):
        tower.to(memory_format=torch.channels_last)
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
    if args.iphone:  # coremltools 9.0 cannot send it an image: timed is a twin of the package that takes an array
        twin = convert(fused, model.name, ct.TensorType(name="image", shape=shape, dtype=np.float32), args.precision)
        with dark.user_error("--iphone: unlock the phone, in Developer Mode; check --team and --bundle in Xcode"):
            latency += asyncio.run(on_core_ml(twin.package_path, image.numpy(), args, phone=phones[0]))
        report(result, report_path)


if __name__ == "__main__":
    main()
