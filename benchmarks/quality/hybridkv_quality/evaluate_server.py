"""`hybridkv eval` on a server: under the policy that it runs, over HTTP."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from hybridkv_quality.conditions import Conditions
from hybridkv_quality.environment import environment
from hybridkv_quality.progress import AnswerBar
from hybridkv_quality.records import AnswerKey
from hybridkv_quality.report import Results
from hybridkv_quality.run_folder import run_folder
from hybridkv_quality.sample import Sample
from hybridkv_quality.server_target import OpenAIServer, ServerRun, ServerSettings
from hybridkv_quality.settings import AS_SERVED, Source
from hybridkv_quality.sources import Samples, by_context, open_samples


def evaluate_server(out: Path, source: Source, settings: ServerSettings, budgets: Sequence[float]) -> Results:
    """Asks a server what the folder has no answer to yet, under the policy that the server runs.

    Several servers, one a policy, may share the folder: only model, samples and options must be the same.
    A server without HybridKV answers once, as it is.

    Raises:
        UsageError: no server, or arguments that fit nothing, before anything is asked.
        EvalError: the server refused or went away; what it had answered is kept.
    """
    samples = open_samples(source)
    server = OpenAIServer(settings)
    options = server.options
    configuration = {
        "served_model": server.model,
        "kv_bytes_per_token": settings.kv_bytes_per_token,
        "options": options.model_dump(exclude={"policy", "budget"}) if options is not None else None,
        "samples": samples.identity(),
    }
    if options is None:
        conditions: list[tuple[str, float | None]] = [(AS_SERVED, None)]
    else:
        conditions = list(Conditions.make([options.policy], budgets))
    with run_folder(out, configuration) as folder:
        run = ServerRun(server, settings, folder.digest)
        with AnswerBar() as bar:
            names = samples.names()
            wanted = {
                AnswerKey(name.task, name.name, *condition) for condition in conditions for name in names
            }
            bar.expect(len(wanted - folder.done))
            bar.say(server.policy)
            for batch in in_batches(samples, settings.concurrency):
                for policy, budget in conditions:
                    missing = [
                        sample
                        for sample in batch
                        if AnswerKey(sample.task, sample.name, policy, budget) not in folder.done
                    ]
                    for message in run.answers(missing, budget):
                        folder.take(message)
                        if message.record is not None:
                            bar.advance()
        return folder.finish(environment(device=f"server at {settings.url}"), settings.seed)


def in_batches(samples: Samples, least: int) -> Iterator[list[Sample]]:
    """Whole contexts, together at least so many samples, so that budgets in turn find prefixes cached."""
    batch: list[Sample] = []
    for group in by_context(samples):
        batch += group
        if len(batch) >= least:
            yield batch
            batch = []
    if batch:
        yield batch
