"""`jinn batch`: a file of requests to a file of answers."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from jinn.cli.options import DEFAULTS, ThreadsOption, parse_size
from jinn.cli.progress import progress_bar

if TYPE_CHECKING:
    from jinn.engine.config import EngineConfig
    from jinn.server.batch import BatchRequest, Progress


def batch(
    requests: Annotated[Path, typer.Argument(metavar="IN.JSONL", help="Requests, in OpenAI's batch lines.")],
    answers: Annotated[Path, typer.Argument(metavar="OUT.JSONL", help="Where the answers go.")],
    model: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="A .gguf file, a Hugging Face folder or a pulled name.",
            show_default="the packaged SmolLM2-135M",
        ),
    ] = None,
    concurrency: Annotated[
        int, typer.Option(metavar="N", help="Requests that run at the same time.", min=1, max=1024)
    ] = DEFAULTS["max_num_seqs"],
    cache_memory: Annotated[
        str, typer.Option(metavar="SIZE", help="Memory for keys and values, such as 2GiB.")
    ] = "2GiB",
    threads: ThreadsOption = None,
) -> None:
    """Answer every request of a file. Run it again to go on where it stopped.

    Every model name in the requests means the one model.
    """
    import asyncio

    from jinn.engine.config import EngineConfig
    from jinn.server.batch import answered_ids, read_requests
    from jinn.weights.model_store import resolve_model

    all_requests = read_requests(requests)
    answered = answered_ids(answers)
    open_requests = [request for request in all_requests if request.custom_id not in answered]
    config = EngineConfig(
        str(resolve_model(model)),
        num_threads=threads,
        max_num_seqs=concurrency,
        cache_memory=parse_size(cache_memory),
        log_level="warning",
    )
    num_refused = 0
    if open_requests:
        with progress_bar("Answering") as on_progress:
            num_refused = asyncio.run(_run(config, open_requests, answers, concurrency, on_progress))
    text = f"{len(open_requests)} answered, {len(all_requests) - len(open_requests)} were answered before"
    print(text + (f", {num_refused} refused" if num_refused else ""), file=sys.stderr)


async def _run(
    config: EngineConfig,
    requests: list[BatchRequest],
    path: Path,
    concurrency: int,
    progress: Progress,
) -> int:
    from jinn.engine.client import EngineError
    from jinn.server.app import App
    from jinn.server.batch import run_batch
    from jinn.server.config import ServerConfig
    from jinn.server.models import Models
    from jinn.server.serve import make_service, start_engine

    engine = await start_engine(config)
    try:
        models = Models.of(make_service(ServerConfig(), config, engine))
    except ValueError:
        await engine.close()
        raise
    try:
        await models.start()
        with path.open("ab") as output:
            return await run_batch(App(models), _for_one_model(requests), output, concurrency, progress)
    except EngineError as error:
        raise ValueError(str(error)) from None
    finally:
        await models.close()


def _for_one_model(requests: list[BatchRequest]) -> list[BatchRequest]:
    """The requests with `default` as their model: files name the model they were first written for."""
    from dataclasses import replace

    return [replace(request, body={**request.body, "model": "default"}) for request in requests]
