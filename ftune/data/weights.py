"""Which turns of a conversation are trained: what the row says of its own turns, in the words of several tools."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ftune.data.formats import Conversation
from ftune.data.spans import assistant_turns
from ftune.errors import DataError

__all__ = ["weighed"]

# keys that say whether a message is in the loss; of the last two True means that it is not
TRAINED = ("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_mask")
MASKED = ("masked", "mask")
WORDS = {"true": True, "false": False, "1": True, "0": False, "1.0": True, "0.0": False, "yes": True, "no": False}
NOT_THE_ASSISTANTS = (
    "turns that are not the assistant's ask to be trained (`weight`, `train`, ...): only assistant turns are"
)
UNTRAINED = "every assistant turn is set to weight 0 (`train: false`): nothing to learn"


def weighed(conversation: Conversation, train_on: str) -> tuple[Conversation, list[int], list[str]]:
    """The conversation without the keys that weigh its turns, the turns to train, and what to tell of it.

    Args:
        conversation: As the row has it.
        train_on: ``assistant``, ``last`` or ``all``. Under ``all`` no turn is named: every token is trained.

    Raises:
        DataError: A weight is neither 0 nor 1, two keys contradict each other, or ``train_on: all`` meets a turn
            that is not to be trained.
    """
    said = [_said(message, f"messages[{i}]") for i, message in enumerate(conversation.messages)]
    keys = {*TRAINED, *MASKED}
    if any(not keys.isdisjoint(message) for message in conversation.messages):
        messages = tuple({k: v for k, v in m.items() if k not in keys} for m in conversation.messages)
        conversation = replace(conversation, messages=messages)
    turns = assistant_turns(conversation)
    if train_on == "all":
        left_out = next((i for i, trained in enumerate(said) if trained is False), None)
        if left_out is not None:
            raise DataError(
                f"messages[{left_out}] is not to be trained (weight 0), and `train_on: all` trains every token",
                help="set `train_on: assistant`, or remove the weights of the turns",
            )
        return conversation, [], []
    notes = []
    if any(trained and conversation.messages[i]["role"] != "assistant" for i, trained in enumerate(said)):
        notes.append(NOT_THE_ASSISTANTS)
    if train_on == "last":
        turns = turns[-1:]
    wanted = [i for i in turns if said[i] is not False]
    if turns and not wanted:
        notes.append(UNTRAINED)
    return conversation, wanted, notes


def _said(message: dict[str, Any], place: str) -> bool | None:
    """Whether a message is to be trained; None where it does not say."""
    found: dict[str, bool] = {}
    for key in (*TRAINED, *MASKED):
        if message.get(key) is not None:
            value = _flag(message[key], key, f"{place}.{key}")
            found[key] = not value if key in MASKED else value
    if len(set(found.values())) > 1:
        keys = " and ".join(f"`{key}: {message[key]}`" for key in found)
        raise DataError(f"{place}: {keys} contradict each other", help="keep one of them")
    return next(iter(found.values()), None)


def _flag(value: Any, key: str, place: str) -> bool:
    """A weight as yes or no."""
    if isinstance(value, str):
        value = WORDS.get(value.strip().lower(), value)
    if key == "mask" and not isinstance(value, bool):
        raise DataError(
            f"{place}: {value!r} may mean that the turn is trained, or that it is not",
            help="write `weight: 1` for a turn that is trained and `weight: 0` for one that is not",
        )
    if isinstance(value, bool) or value in (0, 1):
        return bool(value)
    raise DataError(
        f"{place}: found {value!r}: a turn is trained (1, true) or not (0, false), and nothing between",
        help="leave out the rows that matter less, or write those that matter more several times",
    )
