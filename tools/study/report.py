"""The study's tables (Markdown) and plots (PNG)."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

from tools.study.figures import IN, OUT, SHARES, Results
from tools.study.methods import METHODS, NATIVE
from tools.study.worker import EDGES, TASK_LENGTHS, WINDOW

ROPE_NAMES = {"linear": "PI", "yarn": "YaRN"}


def write_report(output: Path, results: list[dict], domain: str) -> None:
    """``restoration-tables.md``, ``restoration.json`` and three plots in ``output``."""
    found = Results(results, domain)
    output.mkdir(parents=True, exist_ok=True)
    parts = [short_table(found), long_table(found), tokens_table(found), cost_table(found)]
    (output / "restoration-tables.md").write_text("\n".join(parts))
    (output / "restoration.json").write_text(json.dumps(figures(found), indent=1) + "\n")
    plot_curves(output / "restoration-tokens.png", found)
    plot_positions(output / "restoration-positions.png", found)
    plot_retrieval(output / "restoration-passkey.png", found)
    print("\n".join(parts))


def _table(title: str, heading: list[str], rows: list[list[str]]) -> str:
    lines = [f"### {title}\n", "| " + " | ".join(heading) + " |", "|---" * len(heading) + "|"]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)]) + "\n"


def _tokens(count: float | None) -> str:
    if count is None:
        return "not reached"
    return f"{count / 1e6:.2f}M" if count >= 1e6 else f"{count / 1e3:.0f}K"


def _rows(found: Results):
    """(RoPE, name, label, tokens) of everything that is compared, RoPE by RoPE."""
    for rope in found.ropes:
        yield rope, None, f"{ROPE_NAMES[rope]}, not restored", 0
        for name in found.methods:
            if found.runs(name, rope):
                label = f"{ROPE_NAMES[rope]}, {METHODS[name].label}"
                yield rope, name, label, METHODS[name].compared_at


def short_table(found: Results) -> str:
    heading = ["", "tokens", "rate"]
    for where in (IN, OUT):
        heading += [f"gap restored, {where}", f"score kept, {where}"]
    heading += ["KL to teacher, out", "same top-1, out"]
    rows = []
    for rope, name, label, tokens in _rows(found):
        if name is None:
            scaled = found.scaled(rope)
            row = ["0", "", "0", f"{found.score_kept(scaled, IN):.4f}"]
            row += ["0", f"{found.score_kept(scaled, OUT):.4f}"]
            row += [f"{found.short(scaled, OUT, 'kl'):.4f}"]
            row += [f"{found.short(scaled, OUT, 'agreement'):.4f}"]
        else:
            row = [_tokens(tokens), f"{found.runs(name, rope)[0]['rate']:g}"]
            for where in (IN, OUT):
                numbers = (
                    lambda m, w=where, r=rope: found.restored(m, r, w),
                    lambda m, w=where: found.score_kept(m, w),
                )
                row += [found.over_seeds(name, rope, number).text(3) for number in numbers]
            for field in ("kl", "agreement"):
                number = lambda m, f=field: found.short(m, OUT, f)  # noqa: E731
                row.append(found.over_seeds(name, rope, number).text(4))
        rows.append([label, *row])
    return _table(f"Short text (up to M = {NATIVE} tokens)", heading, rows)


def long_table(found: Results) -> str:
    heading = ["", "tokens", f"loss at {WINDOW}, in", f"loss at {WINDOW}, out"]
    heading += ["loss of the last eighth, out"]
    tasks = list(found.teacher["tasks"])
    heading += [f"{task}, {where} M" for task in tasks for where in ("within", "beyond")]
    numbers = [
        lambda m: found.long_loss(m, IN),
        lambda m: found.long_loss(m, OUT),
        lambda m: found.far_loss(m, OUT),
        *(
            lambda m, t=task, b=beyond: found.exact(m, t, b)
            for task in tasks
            for beyond in (False, True)
        ),
    ]
    rows = [["teacher", "", *(f"{number(found.teacher):.3f}" for number in numbers)]]
    for rope, name, label, tokens in _rows(found):
        if name is None:
            cells = [f"{number(found.scaled(rope)):.3f}" for number in numbers]
        else:
            cells = [found.over_seeds(name, rope, number).text(3) for number in numbers]
        rows.append([label, _tokens(tokens) if tokens else "0", *cells])
    return _table(f"Long text (up to f M = {WINDOW} tokens)", heading, rows)


def tokens_table(found: Results) -> str:
    heading = ["", "read in all"]
    heading += [f"{share:.1%} of the gap, {where}" for where in (IN, OUT) for share in SHARES]
    rows = []
    for rope, name, label, _ in _rows(found):
        if name is None:
            continue
        needed = [
            _tokens(found.tokens_needed(name, rope, where, share))
            for where in (IN, OUT)
            for share in SHARES
        ]
        rows.append([label, _tokens(METHODS[name].tokens), *needed])
    return _table("Training tokens needed", heading, rows)


def cost_table(found: Results) -> str:
    heading = ["", "tokens a step", "ms a step", "tokens/s", "peak memory, GiB", "time, s"]
    rows = []
    for name, timing in found.timings.items():
        seconds, tokens = timing["seconds_a_step"], timing["tokens_a_step"]
        whole = METHODS[name].compared_at / tokens * seconds
        rows.append(
            [
                METHODS[name].label,
                f"{tokens:,}",
                f"{seconds * 1e3:.1f}",
                f"{tokens / seconds:,.0f}",
                f"{timing['peak_memory'] / 2**30:.2f}",
                f"{whole:.1f}",
            ]
        )
    return _table("Cost, one run at a time on the device", heading, rows)


def figures(found: Results) -> dict:
    """The tables' numbers and the curves, for other programs."""
    out = {}
    for rope, name, _, _ in _rows(found):
        if name is None:
            continue
        entry = {"rate": found.runs(name, rope)[0]["rate"], "tokens": METHODS[name].compared_at}
        for key, where in (("in_domain", IN), ("out_of_domain", OUT)):
            tokens, shares = found.curve(name, rope, where)
            entry[key] = {
                "restored": found.over_seeds(
                    name, rope, lambda m, r=rope, w=where: found.restored(m, r, w)
                ).__dict__,
                "score_kept": found.over_seeds(
                    name, rope, lambda m, w=where: found.score_kept(m, w)
                ).__dict__,
                "long_loss": found.over_seeds(
                    name, rope, lambda m, w=where: found.long_loss(m, w)
                ).__dict__,
                "curve": [[count, share.mean] for count, share in zip(tokens, shares, strict=True)],
            }
        out[f"{rope}/{name}"] = entry
    return out


def _figure(columns: int, height: float = 4.2):
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    size = (5.2 * columns, height)
    return pyplot.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)


def plot_curves(path: Path, found: Results) -> None:
    """Share of the short-text gap restored out of the training domain, against tokens."""
    figure, axes = _figure(len(found.ropes))
    for panel, rope in zip(axes[0], found.ropes, strict=True):
        for name in found.methods:
            tokens, shares = found.curve(name, rope, OUT)
            means = [share.mean for share in shares]
            (line,) = panel.plot(tokens, means, marker=".", label=METHODS[name].label)
            low = [share.mean - share.farthest for share in shares]
            high = [share.mean + share.farthest for share in shares]
            panel.fill_between(tokens, low, high, color=line.get_color(), alpha=0.15)
        for share in SHARES:
            panel.axhline(share, color="grey", linestyle=":", linewidth=0.8)
        panel.set_xscale("log")
        panel.set_ylim(-0.1, 1.05)
        panel.set_xlabel("training tokens")
        panel.set_title(f"{ROPE_NAMES[rope]} x {WINDOW // NATIVE}")
    axes[0][0].set_ylabel("short-text gap restored,\nout of the training domain")
    axes[0][-1].legend(fontsize=7, loc="lower right")
    figure.savefig(path, dpi=130)


def plot_positions(path: Path, found: Results) -> None:
    """Loss by position in windows of f M tokens, out of the training domain."""
    figure, axes = _figure(len(found.ropes))
    middles = [(a + b) / 2 for a, b in itertools.pairwise(EDGES)]
    domains = found.domains(OUT)

    def losses(measured: dict) -> list[float]:
        rows = [[m["loss"] for m in measured["domains"][d]["by_position"]] for d in domains]
        return [sum(column) / len(column) for column in zip(*rows, strict=True)]

    for panel, rope in zip(axes[0], found.ropes, strict=True):
        panel.plot(middles, losses(found.teacher), "k--", label="teacher")
        panel.plot(middles, losses(found.scaled(rope)), "k:", label="not restored")
        for name in found.methods:
            runs = [losses(run["compared"]) for run in found.runs(name, rope)]
            means = [sum(column) / len(column) for column in zip(*runs, strict=True)]
            panel.plot(middles, means, marker=".", label=METHODS[name].label)
        panel.axvline(NATIVE, color="grey", linewidth=0.8)
        panel.set_title(f"{ROPE_NAMES[rope]} x {WINDOW // NATIVE}")
        panel.set_xlabel("position")
        panel.set_yscale("log")
    axes[0][0].set_ylabel("loss, nats")
    axes[0][-1].legend(fontsize=7)
    figure.savefig(path, dpi=130)


def plot_retrieval(path: Path, found: Results) -> None:
    """Passkey by depth and length, a panel a method, for the first RoPE."""
    rope = found.ropes[0]
    shown = [("teacher", [found.teacher]), ("not restored", [found.scaled(rope)])]
    for name in found.methods:
        runs = [run["compared"] for run in found.runs(name, rope)]
        shown.append((METHODS[name].label, runs))
    figure, axes = _figure(len(shown), 3.0)
    figure.set_size_inches(2.1 * len(shown), 2.8)
    for panel, (label, runs) in zip(axes[0], shown, strict=True):
        by = [run["tasks"]["passkey"] for run in runs]
        lengths = [n for n in TASK_LENGTHS if str(n) in by[0]]
        depths = list(by[0][str(lengths[0])]["by_depth"])
        shares = [
            [sum(run[str(n)]["by_depth"][d] for run in by) / len(by) for n in lengths]
            for d in depths
        ]
        panel.imshow(shares, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_title(label, fontsize=8)
        panel.set_xticks(range(len(lengths)), [str(n) for n in lengths], fontsize=6)
        panel.set_yticks(range(len(depths)), depths, fontsize=6)
    axes[0][0].set_ylabel("depth", fontsize=7)
    figure.supxlabel(f"length; passkey answered exactly, {ROPE_NAMES[rope]}", fontsize=8)
    figure.savefig(path, dpi=130)
