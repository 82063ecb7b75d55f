"""Draws results: accuracy against memory, tasks, chains by hop, and how KV heads were judged."""

from __future__ import annotations

import re
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.ticker import MaxNLocator, NullLocator

from hybridkv_quality.intervals import Estimate
from hybridkv_quality.records import HeadsExample
from hybridkv_quality.report import MIB, ConditionResult, Results
from hybridkv_quality.settings import FULL
from hybridkv_vllm.observe.heads import RequestHeads

# Names of tasks are no formulas, whatever dollar signs they have.
matplotlib.rcParams["text.parse_math"] = False
DPI = 150
# Its heads are shown: they are what the method is about.
SHOWN_POLICY = "hybridkv"
# In Matplotlib's cycle every policy has its own.
MARKERS = "osD^vP*X<>"


def plot_all(results: Results, heads: Sequence[HeadsExample], folder: Path) -> None:
    """Writes every plot that the results have data for; older ones of the same name are replaced."""
    folder.mkdir(exist_ok=True)
    accuracy_by_memory(results, folder / "accuracy_by_memory.png")
    for budget in sorted({c.budget for c in results.conditions if c.budget is not None and c.policy != FULL}):
        shown = [c for c in results.conditions if c.policy == FULL or c.budget == budget]
        accuracy_by_task(shown, results.tasks(), budget, folder / f"tasks_at_{budget:g}.png")
    for task in results.tasks():
        if any(c.tasks[task].hops for c in results.conditions if task in c.tasks):
            accuracy_by_hop(results, task, folder / f"hops_{_file_name(task)}.png")
    for example in smallest_budgets(heads):
        tokens = example.heads.prompt_tokens
        title = f"{example.policy} {example.budget:g}, {example.task}: a prompt of {tokens} tokens"
        file = folder / f"heads_{_file_name(example.task)}.png"
        draw_heads(example.heads, example.classifier, example.theta, title, file)


def accuracy_by_memory(results: Results, file: Path) -> None:
    """One line a policy: the tasks' mean accuracy against what stays in the pool, in bytes if known."""
    in_bytes = all(c.memory.held_bytes is not None for c in results.conditions)
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for number, policy in enumerate(dict.fromkeys(c.policy for c in results.conditions)):
        points = [
            (_held(c, in_bytes), c) for c in results.conditions if c.policy == policy and _held(c, in_bytes)
        ]
        if not points:
            continue
        label = "full cache" if policy == FULL else policy
        xs = [x for x, _ in points]
        axes.errorbar(
            xs,
            [100 * c.mean.value for _, c in points],
            yerr=_error_bars([c.mean for _, c in points]),
            marker=MARKERS[number % len(MARKERS)],
            capsize=3,
            label=label,
            color="black" if policy == FULL else f"C{number % 10}",
        )
    axes.set_xscale("log")
    # Budgets are few: each has its own tick, where the default's labels would run into each other.
    held = {f"{x:.3g}" for c in results.conditions if (x := _held(c, in_bytes))}
    axes.set_xticks([float(x) for x in held])
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    unit = "MiB" if in_bytes else "share of the uncompressed prompt's"
    axes.set_xlabel(f"KV cache held on the GPU while decoding, mean a prompt ({unit})")
    axes.set_ylim(-3, 103)
    axes.set_ylabel("accuracy in %, mean over tasks")
    axes.set_title(f"{len(results.tasks())} tasks; bars: 95% intervals, bootstrap over contexts")
    if axes.has_data():
        figure.legend(loc="outside right upper")
    axes.grid(alpha=0.3)
    _save(figure, file)


def accuracy_by_task(
    conditions: Sequence[ConditionResult], tasks: Sequence[str], budget: float, file: Path
) -> None:
    """Bars for each task, one colour a policy, at one budget beside the full cache."""
    figure, axes = plt.subplots(figsize=(max(6, 1.2 * len(tasks)), 4), layout="constrained")
    width = 0.8 / len(conditions)
    for number, condition in enumerate(conditions):
        shown = [
            (place, condition.tasks[task]) for place, task in enumerate(tasks) if task in condition.tasks
        ]
        axes.bar(
            [place + (number - (len(conditions) - 1) / 2) * width for place, _ in shown],
            [100 * result.accuracy.value for _, result in shown],
            width,
            yerr=_error_bars([result.accuracy for _, result in shown]),
            capsize=2,
            label=condition.name,
            color="#888888" if condition.policy == FULL else f"C{number % 10}",
        )
    axes.set_xticks(range(len(tasks)), tasks, rotation=25, ha="right")
    axes.set_ylabel("accuracy in %")
    axes.set_ylim(0, 105)
    axes.set_title(f"Tasks at budget {budget:g}; bars: 95% intervals")
    figure.legend(loc="outside right upper")
    _save(figure, file)


def accuracy_by_hop(results: Results, task: str, file: Path) -> None:
    """One panel a budget: the share of answers whose word is right, by its place in the answer."""
    budgets = sorted({c.budget for c in results.conditions if c.policy != FULL and task in c.tasks}, key=str)
    panels: list[Any] = budgets or [1.0]
    figure, all_axes = plt.subplots(
        1, len(panels), figsize=(3.4 * len(panels) + 1, 3.4), sharey=True, squeeze=False, layout="constrained"
    )
    policies = list(dict.fromkeys(c.policy for c in results.conditions))
    for axes, budget in zip(all_axes[0], panels, strict=True):
        for condition in results.conditions:
            if task not in condition.tasks or not (condition.policy == FULL or condition.budget == budget):
                continue
            hops = condition.tasks[task].hops or []
            number = policies.index(condition.policy)
            axes.plot(
                range(1, len(hops) + 1),
                [100 * share for share in hops],
                marker=MARKERS[number % len(MARKERS)],
                label=condition.policy,
                color="black" if condition.policy == FULL else f"C{number % 10}",
            )
        axes.set_xlabel("word of the answer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_title("" if budget is None else f"budget {budget:g}")
        axes.set_ylim(-3, 103)
        axes.grid(alpha=0.3)
    all_axes[0][0].set_ylabel("right in %")
    handles, labels = all_axes[0][-1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper")
    figure.suptitle(f"{task}: right at each word")
    _save(figure, file)


def smallest_budgets(heads: Iterable[HeadsExample]) -> list[HeadsExample]:
    """For each task the shown policy's prompt with the smallest budget."""
    chosen: dict[str, HeadsExample] = {}
    for example in heads:
        if example.policy != SHOWN_POLICY or example.budget is None:
            continue
        before = chosen.get(example.task)
        if before is None or before.budget is None or example.budget < before.budget:
            chosen[example.task] = example
    return list(chosen.values())


def draw_heads(heads: RequestHeads, classifier: str, theta: float, title: str, file: Path) -> None:
    """Heat maps over layers and KV heads: the classifier's figure, the verdict, and pages of the budget."""
    layers = heads.layers
    figures = np.array([[head.figure for head in layer] for layer in layers])
    kinds = np.array([[(head.type == "dynamic") + head.recalled for head in layer] for layer in layers])
    pages = np.array([[head.pages for head in layer] for layer in layers])
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(9, 1.6 + 0.3 * len(layers)), layout="constrained"
    )
    shown = left.imshow(figures, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    figure.colorbar(shown, ax=left)
    left.set_title(f"S: {classifier}\n(static from {theta:g})")
    colours = ListedColormap(["#c9d6df", "#f0a35e", "#c8443c"])
    shown = middle.imshow(kinds, vmin=-0.5, vmax=2.5, aspect="auto", cmap=colours)
    figure.colorbar(shown, ax=middle, ticks=[0, 1, 2]).set_ticklabels(["static", "pruned", "recalls"])
    middle.set_title("type\n(pruned: no recall)")
    shown = right.imshow(pages, vmin=0, aspect="auto", cmap="magma")
    figure.colorbar(shown, ax=right)
    right.set_title("budget\n(pages of 16 tokens)")
    for axes in (left, middle, right):
        axes.set_xlabel("KV head")
        axes.set_xticks(range(figures.shape[1]))
    left.set_ylabel("layer")
    figure.suptitle(title)
    _save(figure, file)


def _held(condition: ConditionResult, in_bytes: bool) -> float | None:
    memory = condition.memory
    if in_bytes:
        return None if memory.held_bytes is None else memory.held_bytes / MIB
    return memory.held_share


def _error_bars(estimates: Sequence[Estimate]) -> list[list[float]]:
    """Lengths below and above, in per cent."""
    return [[100 * (e.value - e.low) for e in estimates], [100 * (e.high - e.value) for e in estimates]]


def _file_name(task: str) -> str:
    """The task's name if it can be part of a file's, else one that is like it and unlike any other's."""
    if re.fullmatch(r"[\w.-]{1,100}", task, re.ASCII):
        return task
    return f"{re.sub(r'[^a-zA-Z0-9_.-]+', '_', task)[:100]}-{zlib.crc32(task.encode()):08x}"


def _save(figure: Any, file: Path) -> None:
    # Without a suffix, Matplotlib would add one to the name that was asked for.
    figure.savefig(file, dpi=DPI, format=None if file.suffix else "png")
    plt.close(figure)
