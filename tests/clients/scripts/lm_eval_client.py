"""lm-eval, on local tasks and with the server's own tokenizer: `python lm_eval_client.py URL`."""

from __future__ import annotations

import os
from pathlib import Path

from task import BASE_URL

TASKS = Path(__file__).with_name("capitals")
os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_HOME=str(Path.cwd() / "hf"))
os.chdir(TASKS)  # where the tasks look for their data

import lm_eval  # noqa: E402  it reads the environment
from lm_eval.tasks import TaskManager  # noqa: E402

found = lm_eval.simple_evaluate(
    model="local-completions",
    model_args={
        "model": "default",
        "base_url": f"{BASE_URL}/completions",
        "num_concurrent": 2,
        "max_retries": 1,
    },
    tasks=["capitals", "capital_names"],
    task_manager=TaskManager(include_path=str(TASKS), include_defaults=False),
    log_samples=True,
)
assert found["results"]["capitals"]["acc,none"] == 1, found["results"]
for sample in found["samples"]["capitals"]:
    assert all(logprob < 0 for ((logprob, _),) in sample["resps"]), sample["resps"]
answers = [sample["resps"][0][0] for sample in found["samples"]["capital_names"]]
assert "Paris" in answers[0], answers
