"""What train_step.py prints: tables of speed, parts and kernels, and plots."""

from matplotlib.figure import Figure

from voxtral.evaluation_report import markdown

GROWTH_AXES = {"batch": (int, "clips in a batch"), "seconds": (float, "seconds of a clip")}
N_KERNELS = 40  # rows of the table of kernels

# Kind of kernel -> what stands in the names of such; the first that fits.
KINDS = {
    "fused (torch.compile)": ("triton_",),
    "FFT": ("fft", "regular_r2c", "vector_r2c"),
    "convolutions": ("conv", "dgrad", "wgrad", "fprop", "cudnn", "nchw"),
    "attention": ("flash", "fmha", "attention"),
    "matrix products": ("gemm", "nvjet", "cutlass", "xmma", "splitk"),
    "optimizers, clipping, averaging": ("adam", "multi_tensor", "lpnorm"),
    "copies": ("memcpy", "memset", "copy"),
}

HEAD = ["", "audio s/s", "over all steps", "ms/step", "10 %", "90 %", "data wait ms", "peak GiB"]


def row(name: str, result: dict) -> list[str]:
    if "error" in result:
        return [name, result["error"], *["-"] * (len(HEAD) - 2)]
    step, memory = result["step_ms"], result.get("memory_gib", {})
    return [
        name,
        f"{result['audio_sec_per_sec']:.4g}",
        f"{result['audio_sec_per_sec_overall']:.4g}",
        *(f"{step[key]:.1f}" for key in ("median", "p10", "p90")),
        f"{result['data_wait_ms']:.1f}",
        ", ".join(f"{value:.2f} {name}" for name, value in memory.items()) or "-",
    ]


def parts_report(result: dict) -> str:
    """The table of parts, and its sum."""
    parts = result["parts_ms"]
    total = sum(sum(both.values()) for both in parts.values())
    rows = [
        [part, f"{both['forward']:.2f}", f"{both['backward']:.2f}", f"{sum(both.values()) / total:.1%}"]
        for part, both in parts.items()
    ]
    rows = [["data wait (host)", f"{result['data_wait_ms']:.2f}", "-", "-"], *rows]
    sums = [sum(both[way] for both in parts.values()) for way in ("forward", "backward")]
    rows.append(["sum without data wait", *(f"{value:.2f}" for value in sums), "100.0%"])
    return markdown(["ms of a step", "forward", "backward", "share"], rows)


def kernels_report(result: dict, on_gpu: bool) -> str:
    """Tables of the kernels and of their kinds."""
    kinds: dict[str, float] = {}
    for name, ms, _ in result["kernels"]:
        kinds[kind_of(name)] = kinds.get(kind_of(name), 0.0) + ms
    total = sum(kinds.values())
    rows = [[kind, f"{ms:.2f}", f"{ms / total:.1%}"] for kind, ms in sorted(kinds.items(), key=lambda one: -one[1])]
    kernels = [[name[:110], f"{ms:.3f}", f"{calls:.0f}"] for name, ms, calls in result["kernels"][:N_KERNELS]]
    report = markdown(["kernel" if on_gpu else "operator", "ms of a step", "calls"], kernels)
    return (markdown(["kind of kernel", "ms of a step", "share"], rows) + "\n\n" if on_gpu else "") + report


def flops_report(result: dict, ceiling_tflops: float | None) -> str:
    line = (
        f"{result['flop_per_step'] / 1e12:.3g} TFLOP a step and process, "
        f"{result['flop_per_audio_sec'] / 1e9:.3g} GFLOP per second of audio, "
        f"{result['tflop_per_sec']:.3g} TFLOP/s"
    )
    return line + (f", {result['ceiling_share']:.1%} of {ceiling_tflops:g}" if ceiling_tflops else "")


def growth_figure(axis: str, results: list[dict]) -> Figure:
    """Speed, time and memory against the batch or the length of a clip."""
    figure = Figure(figsize=(11, 3.4), layout="constrained")
    panels = figure.subplots(1, 3)
    done = [result for result in results if "error" not in result]
    values = [result[axis] for result in done]
    curves = {
        "audio seconds per second": [result["audio_sec_per_sec"] for result in done],
        "ms a step": [result["step_ms"]["median"] for result in done],
        "peak memory, GiB": [max(result["memory_gib"].values()) for result in done],
    }
    for panel, (title, points) in zip(panels, curves.items()):
        panel.plot(values, points, marker="o")
        panel.set_title(title, fontsize=10)
        panel.set_xlabel(GROWTH_AXES[axis][1])
        panel.set_xlim(left=0)
        panel.set_ylim(0, 1.1 * max(points, default=1))
        panel.grid(alpha=0.3)
    return figure


def kind_of(kernel: str) -> str:
    """Of KINDS, by the kernel's name."""
    return next((kind for kind, words in KINDS.items() if any(word in kernel.lower() for word in words)), "others")
