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
import platform
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

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
log.setLevel(logging.ERROR)  # its import warns of every untested version, and on Linux of the missing Core ML framework
import coremltools as ct  # noqa: E402
from coremltools.models.compute_device import MLNeuralEngineComputeDevice  # noqa: E402
from coremltools.models.compute_plan import MLComputePlan  # noqa: E402
from coremltools.models.ml_program.experimental import perf_utils, remote_device  # noqa: E402

log.setLevel(logging.NOTSET)

# ---------------------------------------------------------------- command line

CHECKPOINT, PAPER, RANDOM = Path("out/student.pt"), "MobileCLIP2-S0", "Random weights, for timing only"


def parse_args(argv=None):
    parser = dark.Parser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("checkpoint", nargs="?", help=f"of dark.py [{CHECKPOINT}; if there is none, {PAPER} with random weights]")
    add("--out", type=Path, default=Path("out/MobileFetalCLIP.mlpackage"), help="package to write [%(default)s]")
    add("--precision", choices=("fp16", "fp32"), default="fp16", help="of weights and activations [%(default)s]")
    add("--labels", default="", help="adds probabilities: planes, brain, or a JSON FILE with class -> [prompts]")
    add("--runs", type=int, default=200, help="timed runs per latency [%(default)s]")
    add("--iphone", action="store_true", help="time it on the connected iPhone too (macOS with Xcode)")
    add("--team", default="", help="with --iphone: your Apple development team ID")
    add("--bundle", default="", help="with --iphone: bundle identifier for the benchmark app, such as org.example.bench")
    add("--model", default="", help="an open_clip model instead of a checkpoint")
    add("--weights", default="", help="with --model: PATH or open_clip TAG; without it random weights, for timing")
    add("--context-length", type=int, default=0, help="with --model: tokens [the model's own]")
    add("--mean", default="", help="with --model: R,G,B [the model's own]")
    add("--std", default="", help="with --model: R,G,B [the model's own]")
    args = parser.parse_args(argv)

    if args.checkpoint and args.model:
        fail(f"{args.checkpoint} with --model {args.model}: give a checkpoint or a model, not both")
    for flag in ("weights", "context_length", "mean", "std"):
        if getattr(args, flag) and not args.model:
            fail(f"--{flag.replace('_', '-')} goes with --model NAME; a checkpoint knows its own")
    if args.runs < 1:
        fail(f"--runs {args.runs}: must be 1 or more")
    if args.out.suffix != ".mlpackage":
        fail(f"--out {args.out}: must end in .mlpackage")
    if args.out.exists() and not (args.out / "Manifest.json").is_file():
        fail(f"--out {args.out}: exists and is no Core ML package, so it is not replaced; choose another path")
    if (args.team or args.bundle) and not args.iphone:
        fail("--team and --bundle go with --iphone")
    return args


# ---------------------------------------------------------------- the model


def sha256(path):
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def open_subject(args):
    """-> dark.Model in eval mode, and what the package's metadata tells of its weights."""
    path = Path(args.checkpoint or CHECKPOINT)
    if not args.model and (args.checkpoint or path.exists()):
        checkpoint = dark.load_checkpoint(path)
        about = {"source": str(path), "checkpoint_sha256": sha256(path)}
        about |= {key: str(checkpoint["config"][key]) for key in ("beta0", "r")} | {"epoch": str(checkpoint["epoch"])}
        model = dark.model_from_checkpoint(checkpoint)
        print(f"{path}: {model.name}, {model.size} x {model.size}, epoch {checkpoint['epoch']}")
        return model, about
    torch.manual_seed(0)
    name = args.model or PAPER
    model = dark.open_model(name, args.weights, args.context_length, args.mean, args.std)
    model.clip.eval()
    if args.weights or ":" in name:  # hf-hub:... brings its weights
        source = args.weights or name
        print(f"{model.name}, {model.size} x {model.size}, weights {source}")
        return model, {"source": source} | ({"checkpoint_sha256": sha256(source)} if Path(source).is_file() else {})
    print(f"{RANDOM}: {model.name}, {model.size} x {model.size} ", end="")
    print("(--weights FILE|TAG gives it real ones)" if args.model else f"({CHECKPOINT} does not exist; see dark.py)")
    return model, {"source": RANDOM}


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
        return embedding, F.linear(embedding, self.classes).softmax(-1)  # (1, D) (D, C) -> (1, C)


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
    """Merges the training-time branches of a tower, and its batch norms, into single convolutions, exactly.

    Returns the fused copy, the largest relative difference that it makes to an embedding, and the smallest distance
    between two images' embeddings.
    """
    fused = timm.utils.reparameterize_model(tower)
    before, after = tower(images)[0], fused(images)[0]  # (n, D), unit norm
    return fused, (before - after).norm(dim=1).max().item(), torch.pdist(before).min().item()


def fuse_and_check(tower, images):
    """-> the fused tower and the difference; stops when fusing changes what the tower computes."""
    fused, difference, spread = fuse(tower, images)
    checked = ""
    if not spread >= SPREAD:  # hardly trained: the same fusing must also be right where it shows
        _, on_livened, spread = fuse(livened(copy.deepcopy(tower), images), images)
        difference, checked = max(difference, on_livened), ", on a copy with livelier weights"
    print(f"fused: embeddings of {len(images)} images change by at most {difference:.1e} relative", end="")
    print(f" (limit {TOLERANCE:.0e}; they lie at least {spread:.2g} apart{checked})")
    if not spread >= SPREAD:
        fail(f"all images look alike to this model ({spread:.1e} apart), so fusing cannot be checked")
    if not difference <= TOLERANCE:
        fail(f"fusing changes an embedding by {difference:.1e} relative, more than {TOLERANCE:.0e}")
    return fused, difference


# ---------------------------------------------------------------- conversion


@contextlib.contextmanager
def quiet():
    """coremltools without its progress bars, which have no switch. Yields a list, where the errors that it logs go
    instead of to the terminal: it raises them too. Its warnings still show."""
    errors, shown, torch_log = [], tqdm.__init__, logging.getLogger("torch")
    level = torch_log.level

    def divert(record):
        if record.levelno >= logging.ERROR:
            errors.append(record.getMessage())
        return record.levelno < logging.ERROR

    tqdm.__init__ = functools.partialmethod(shown, disable=True)
    log.addFilter(divert)
    torch_log.setLevel(logging.ERROR)
    try:
        yield errors
    finally:
        torch_log.setLevel(level)
        log.removeFilter(divert)
        tqdm.__init__ = shown


@contextlib.contextmanager
def converting(name):
    """Turns what torch.export or coremltools cannot do with a tower into one line, which names the operation."""
    with quiet() as errors:
        try:
            yield
        except (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
            why = dark.one_line(" ".join([*errors, str(error)]))
            fail(f"{name}: its image tower cannot be converted to Core ML: {why}")


@torch.no_grad()
def convert(tower, name, size, precision, image_input=True):
    """Phone -> Core ML model (not loaded). image_input=False: `image` is a (1, 3, S, S) array in 0..1 instead."""
    shape = (1, 3, size, size)
    with converting(name), contextlib.redirect_stderr(io.StringIO()):  # where torch.export prints graphs that fail
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
    """Fills in what Xcode shows and what an app can read at run time; user metadata are strings, here of JSON."""
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
    with tempfile.TemporaryDirectory(prefix=".export-", dir=out.parent) as folder:
        new, old = Path(folder) / out.name, Path(folder) / "replaced"
        package.save(str(new))
        (new / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)  # 150 KB of the converter's debugging
        if out.exists():
            out.rename(old)
        new.rename(out)
    return sum(file.stat().st_size for file in out.rglob("*") if file.is_file())


# ---------------------------------------------------------------- cost


@torch.no_grad()
def count_macs(tower, size):
    """Multiply-accumulates of one image in units of 1e9, by kind. FlopCounterMode counts two operations for each."""
    # nn.MultiheadAttention's fast path is one opaque operation, which would count as nothing.
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with FlopCounterMode(display=False) as counter:
        tower(torch.zeros(1, 3, size, size))
    torch.backends.mha.set_fastpath_enabled(fast)
    macs = {"convolutions": 0.0, "matrix products": 0.0, "attention": 0.0}
    for operation, flops in counter.get_flop_counts()["Global"].items():
        kind = "convolutions" if "conv" in str(operation) else "attention" if "attention" in str(operation) else "matrix products"
        macs[kind] += flops / 2e9
    return macs


WARM_UP = 10  # runs before the timed ones


@torch.inference_mode()
def cpu_latency(tower, image, runs, title):
    """Milliseconds of each run on one image."""
    samples = []
    for i in tqdm(range(-WARM_UP, runs), desc=title, unit="run", leave=False, disable=None):
        start = time.perf_counter()
        tower(image)
        if i >= 0:
            samples.append(1e3 * (time.perf_counter() - start))
    return samples


def row(runtime, device, system, units, precision, samples):
    median, p90 = np.percentile(samples, (50, 90)).round(3).tolist()
    where = {"runtime": runtime, "device": device, "os": system, "compute_units": units, "precision": precision}
    return where | {"median_ms": median, "p90_ms": p90, "runs": len(samples)}


def cpu_name():
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        named = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text(), re.MULTILINE)
        return named[1] if named else platform.machine()
    if platform.system() == "Darwin":
        return subprocess.run(["sysctl", "-n", "machdep.cpu.brand_string"], capture_output=True, text=True).stdout.strip()
    return platform.processor()


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
    usages = [plan.get_compute_device_usage_for_mlprogram_operation(o) for o in operations if "const" not in o.operator_name]
    chosen = [isinstance(u.preferred_compute_device, MLNeuralEngineComputeDevice) for u in usages if u]
    return sum(chosen) / len(chosen) if chosen else 0.0


def on_this_mac(out, tower, pixels, args):
    """A row per compute unit: latency, difference to PyTorch's embedding, share of the Neural Engine."""
    image, rows = Image.fromarray(pixels.numpy()), []
    with torch.no_grad():
        expected = tower(pixels.permute(2, 0, 1)[None] / 255)[0].numpy()
    for units in tqdm(UNITS, desc="Core ML", leave=False, disable=None):
        model = ct.models.MLModel(str(out), compute_units=ct.ComputeUnit[units])
        samples = asyncio.run(coreml_latency(model, image, args.runs))
        difference = float(np.abs(model.predict({"image": image})["embedding"] - expected).max())
        measured = row("Core ML", cpu_name(), platform.platform(terse=True), units, args.precision, samples)
        rows.append(measured | {"difference": difference, "neural_engine_share": neural_engine_share(model)})
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
    phones = remote_device.Device.get_connected_devices(remote_device.DeviceType.IPHONE)
    if not phones:
        fail("--iphone: no connected iPhone; plug it in, unlock it, trust this Mac, and see xcrun devicectl list devices")
    if phones[0].developer_mode_state != "enabled":
        fail(f"--iphone: {phones[0].name} is not in Developer Mode; Settings > Privacy & Security > Developer Mode")
    return phones[0]


async def time_on_iphone(phone, twin, pixels, args):
    """-> compute units -> milliseconds. Builds, installs and starts coremltools' benchmark app first."""
    image = (pixels.permute(2, 0, 1)[None] / 255).numpy()  # (1, 3, S, S) fp32
    credentials = remote_device.AppSigningCredentials(development_team=args.team, bundle_identifier=args.bundle)
    with tempfile.TemporaryDirectory() as folder:
        ready = await phone.prepare_for_model_debugging(credentials=credentials, working_directory=Path(folder))
        samples = {}
        for units in UNITS:
            model = ct.models.MLModel(
                twin.get_spec(), weights_dir=twin.weights_dir, compute_units=ct.ComputeUnit[units], skip_model_load=True
            )
            samples[units] = await coreml_latency(model, image, args.runs, device=ready)
        ready.session.stop()
    return samples


def on_iphone(phone, tower, model, pixels, args):
    """A row per compute unit. coremltools 9.0 cannot send an image to a phone, so a twin that takes an array is timed."""
    twin = convert(tower, model.name, model.size, args.precision, image_input=False)
    refused = (ValueError, RuntimeError, remote_device._DeviceCtlError, remote_device._AppBuilder.Error)
    print(f"timing on {phone.name}: every run is a request over devicectl, seconds each; keep the phone unlocked")
    try:
        with quiet():
            samples = asyncio.run(time_on_iphone(phone, twin, pixels, args))
    except refused as error:
        fail(f"--iphone: {dark.one_line(error)}; unlock the phone, keep it awake, and check --team and --bundle in Xcode")
    system = f"iOS {phone.os_version}"
    return [row("Core ML", phone.name, system, units, args.precision, ms) for units, ms in samples.items()]


# ---------------------------------------------------------------- report


def report(result, out):
    """Prints the latency table and writes export.json beside the package."""
    cells = [["runtime", "device", "OS", "compute units", "precision", "median ms", "p90 ms"]]
    keys = ("runtime", "device", "os", "compute_units", "precision")
    cells += [[r[k] for k in keys] + [f"{r['median_ms']:.2f}", f"{r['p90_ms']:.2f}"] for r in result["latency"]]
    widths = [max(map(len, column)) for column in zip(*cells)]
    for line in cells:
        print("  ".join(c.rjust(w) if i > 4 else c.ljust(w) for i, (c, w) in enumerate(zip(line, widths))))
    for r in result["latency"]:
        if "difference" in r:
            print(f"{r['compute_units']}: embedding differs from PyTorch's by at most {r['difference']:.1e}; "
                  f"{r['neural_engine_share']:.0%} of the operations prefer the Neural Engine")  # fmt: skip
    path = out.with_name("export.json")
    dark.write_atomically(path, lambda temporary: temporary.write_text(json.dumps(result, indent=2) + "\n"))


def main(argv=None):
    args = parse_args(argv)
    phone = find_iphone(args) if args.iphone else None
    prompts = evaluate.PROMPTS[args.labels] if args.labels in ("planes", "brain") else None
    if args.labels and not prompts:
        prompts = {c: p for c, p in evaluate.read_prompts(args.labels).items() if c != "ga"}  # age templates, no class
        if not prompts:
            fail(f"--labels {args.labels}: holds no class -> [prompts]")
    started = time.perf_counter()
    torch.set_num_threads(1)  # other work on the machine disturbs one thread least, so the latencies repeat
    model, about = open_subject(args)

    with torch.no_grad():
        scale = model.clip.logit_scale.exp()
        classes = scale * evaluate.class_embeddings(model, prompts) if prompts else None  # (C, D)
    trained = Phone(model, classes)
    images = probe_images(model.size)
    if about["source"] == RANDOM:
        livened(trained, images)
    fused, difference = fuse_and_check(trained, images)
    branched = fused.state_dict().keys() != trained.state_dict().keys()  # a ViT has nothing to fuse
    before, after = (sum(p.numel() for p in tower.visual.parameters()) for tower in (trained, fused))
    macs = count_macs(fused, model.size)

    package = convert(fused, model.name, model.size, args.precision)
    describe(package, model, prompts, about)
    try:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        size = save(package, args.out)
    except OSError as error:
        fail(f"--out {args.out}: cannot be written ({dark.one_line(error)})")
    seconds = time.perf_counter() - started
    print(f"parameters: {after / 1e6:.2f} M in the image tower" + f" ({before / 1e6:.2f} M before fusing)" * branched)
    print(f"GMACs: {sum(macs.values()):.2f}, multiply-accumulates of one image through the fused tower:", end=" ")
    print(", ".join(f"{kind} {count:.2f}" for kind, count in macs.items()))
    print(f"package: {args.out}, {args.precision}, {size / 1e6:.2f} MB on disk, made in {seconds:.0f} s")

    pixels = (images[3] * 255).round().byte().permute(1, 2, 0).contiguous()  # (S, S, 3) uint8
    image = (pixels / 255).permute(2, 0, 1)[None]  # (1, 3, S, S), channels last in memory
    towers = {"PyTorch unfused": trained, "PyTorch fused": fused} if branched else {"PyTorch": fused}
    system, latency = platform.platform(terse=True), []
    for runtime, tower in towers.items():
        tower.to(memory_format=torch.channels_last)  # in which the fused tower is fastest
        samples = cpu_latency(tower, image, args.runs, runtime)
        latency.append(row(runtime, cpu_name(), system, "CPU, 1 thread", "fp32", samples))
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
        latency += on_iphone(phone, fused, model, pixels, args)
        report(result, args.out)


if __name__ == "__main__":
    main()
