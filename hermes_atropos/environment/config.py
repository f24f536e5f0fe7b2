"""What an environment can be told."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal

from atroposlib.envs.base import BaseEnvConfig
from pydantic import BeforeValidator, Field

from hermes_atropos.sandbox.wall import Access

__all__ = ["HermesEnvConfig"]


def split_at_commas(value: Any) -> Any:
    return value.split(",") if isinstance(value, str) else value


def read_json(value: Any) -> Any:
    return json.loads(value) if isinstance(value, str) else value


Names = Annotated[list[str], BeforeValidator(split_at_commas)]


class HermesEnvConfig(BaseEnvConfig):
    """``BaseEnvConfig`` and what rollouts of an agent need beside; ``max_token_length`` limits each answer of a model.

    ``ensure_scores_are_not_same`` says what becomes of groups without spread: they are not sent, but kept and counted.
    """

    use_wandb: bool = Field(default=False, description="Log to Weights & Biases.")
    worker_timeout: float = Field(
        default=-1, description="Seconds a group may take; -1 for no limit. Keep it above what its rollouts may take."
    )
    steps_per_eval: int = Field(default=0, description="Training steps between two evaluations; 0 for none.")
    enabled_toolsets: Names = Field(
        default=["terminal", "file"], description="Hermes' toolsets; on the command line with commas between."
    )
    max_iterations: int = Field(default=50, description="Model calls a rollout may make.")
    temperature: float = Field(default=1.0, description="Temperature of the model calls.")
    train_skewed: bool = Field(
        default=False,
        description="Train also on answers whose logprobs are not those that they were sampled with, such as those of "
        "another temperature than 1 on a plain vLLM.",
    )
    chat_template_kwargs: Annotated[dict[str, Any], BeforeValidator(read_json)] = Field(
        default={},
        description='Further arguments of the chat template; on the command line as JSON: {"enable_thinking": false}.',
    )
    rollout_timeout: float = Field(
        default=540, description="Seconds a rollout may take; 0 for no limit. A later one has failed."
    )
    verify_timeout: float = Field(default=300, description="Seconds a verifier may take; 0 for no limit.")
    failed_rollouts: Literal["retry", "replace", "drop"] = Field(
        default="retry",
        description="Rollouts that the infrastructure ended: retry (rollout_attempts in all, then left out), replace "
        "(as retry; a group that is not whole gives way to the next item) or drop.",
    )
    rollout_attempts: int = Field(default=3, ge=1, description="How often a failing rollout is run in all.")
    discarded_attempts: Literal["drop", "train"] = Field(
        default="drop", description="Answers that Hermes threw away: drop or train."
    )
    malformed_calls: Literal["keep", "mask", "penalise", "stop"] = Field(
        default="keep", description="Malformed tool calls: keep, mask, penalise or stop (the rollout)."
    )
    malformed_penalty: float = Field(default=1.0, description="What malformed_calls=penalise takes off the score.")
    extra_sequences: Literal["train", "longest"] = Field(
        default="train",
        description="A rollout's sequences beyond one: train (all, with its score) or longest.",
    )
    mixed_weights: Literal["train", "mask", "drop"] = Field(
        default="train",
        description="Sequences that weights of several versions sampled: train, mask (all but the last) or drop.",
    )
    records_path: str | None = Field(
        default=None, description="Write each rollout to this JSONL file, also one that failed."
    )
    log_folder: str | None = Field(
        default=None, description="Under which folder Hermes keeps its log files; by default it writes none."
    )
    outbox_path: str = Field(
        default="outbox",
        description="Folder in which finished groups wait until the API has taken them. What an earlier process left "
        "there is delivered: give each training run a folder of its own.",
    )
    eval_size: int = Field(default=100, ge=1, description="Items that an evaluation takes at most.")
    process_index: int = Field(default=0, ge=0, description="Which of the environment's processes this is, from 0.")
    process_count: int = Field(
        default=1, ge=1, description="How many processes share the items and max_num_workers among them."
    )
    keep_env: Names = Field(
        default=[],
        description="Environment variables that the training profile leaves although they hold a model provider's key "
        "or address, such as those of a judge in verify.",
    )
    harness: Literal["hermes", "react", "command"] = Field(
        default="hermes",
        description="What runs each rollout: hermes, Hermes' own loop; react, the small agent on the same toolsets; "
        "command, a command of yours.",
    )
    command: str = Field(
        default="",
        description="With harness=command, for a shell in the sandbox: OPENAI_BASE_URL and OPENAI_API_KEY are in its "
        "environment, for an endpoint of the rollout's own, and PROMPT.",
    )
    sandbox: Literal["walled", "folder"] = Field(
        default="walled",
        description="Where the tools act: walled keeps this machine from what the policy runs; folder doesn't, and is "
        "for tools that are functions of this process, or machines without user namespaces.",
    )
    network: bool = Field(default=False, description="Whether walled rollouts may use this machine's network.")
    mounts: dict[str, Access] = Field(
        default={}, description="What else of this machine walled rollouts see, by its path: ro, rw or copy."
    )

    def sandbox_arguments(self) -> dict[str, Any]:
        """For ``task`` of an agent."""
        if self.sandbox == "folder":
            return {"sandbox": "folder"}
        return {"sandbox": "walled", "network": self.network, "mounts": self.mounts}
