"""`hybridkv eval` on this machine: an engine for each policy, in a process of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from hybridkv_quality.conditions import Conditions
from hybridkv_quality.engine_process import run_engine
from hybridkv_quality.environment import environment, model_digest
from hybridkv_quality.progress import AnswerBar
from hybridkv_quality.records import AnswerKey
from hybridkv_quality.report import Results
from hybridkv_quality.run_folder import run_folder
from hybridkv_quality.settings import EngineJob, EngineSettings, Source
from hybridkv_quality.sources import open_samples


def evaluate_engine(
    out: Path,
    source: Source,
    engine: EngineSettings,
    policies: Sequence[str],
    budgets: Sequence[float],
) -> Results:
    """Asks an engine in this machine, one child process a policy, what the folder has no answer to yet.

    Raises:
        UsageError: arguments that fit nothing, before anything is started.
        EvalError: an engine failed; what it had answered is kept.
    """
    conditions = Conditions.make(policies, budgets)
    samples = open_samples(source)
    files = model_digest(engine.model)
    configuration = {
        # Wherever a folder lies, its files say which model it is.
        "model": engine.model if files is None else Path(engine.model).name,
        "model_files": files,
        "dtype": engine.dtype,
        "options": engine.options,
        "samples": samples.identity(),
    }
    with run_folder(out, configuration) as folder:
        with AnswerBar() as bar:
            names = samples.names()
            wanted = {
                AnswerKey(name.task, name.name, *condition) for condition in conditions for name in names
            }
            bar.expect(len(wanted - folder.done))
            for policy, policy_budgets in conditions.budgets_by_policy.items():
                missing = {key for key in wanted - folder.done if key.policy == policy}
                if not missing:
                    continue
                job = EngineJob(
                    source=source,
                    engine=engine,
                    policy=policy,
                    budgets=policy_budgets,
                    configuration=folder.digest,
                    done=frozenset(
                        (key.task, key.sample, key.budget)
                        for key in folder.done
                        if key.policy == policy and key.budget is not None
                    ),
                    most_pictures=max(name.pictures for name in names),
                )
                bar.say(f"{policy}: starting")
                for message in run_engine(job, out / f"engine-{policy}.log"):
                    bar.say(policy)
                    folder.take(message)
                    if message.record is not None:
                        bar.advance()
        return folder.finish(environment(), engine.seed)
