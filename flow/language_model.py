"""Language models as transformers loads them from a local folder, and batches that they can be called with."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..formats.errors import CheckpointError, UsageError
from .sizes import count
from .token_batches import Amount, Frame, batched, random_ids, text_ids

_log = logging.getLogger(__name__)

Batches = tuple[list[dict[str, Any]], list[str]]
"""Batches, and notes for the user."""

MISSING = "calibrating a model of transformers needs transformers: pip install 'quantloom[calibrate]'"
_ANY_LENGTH = 1_000_000
"""Tokenizers without a limit say a number far beyond this."""


class LanguageModel:
    """A model of transformers in a local folder."""

    def __init__(self, folder: Path, device: str) -> None:
        """Loads it: in float32 on a CPU, as stored elsewhere. Raises UsageError or CheckpointError."""
        self.folder, self.device, self.notes = folder, device, list[str]()
        with _speaking(folder):
            self.model: Any = self._load()
        self.config = self.model.config
        if getattr(self.config, "use_cache", None):
            self.config.use_cache = False  # keys and values of tokens that never come
        _cut_head(self.model)

    def text(self, path: str, amount: Amount) -> Batches:
        """Batches of a text's tokens."""
        tokenizer = self._tokenizer()
        if tokenizer is None:
            raise UsageError(
                f"{self.folder}: no tokenizer that transformers can load lies beside the model, so --text cannot be "
                "turned into tokens; copy tokenizer.json and tokenizer_config.json there, or use --random-tokens"
            )
        amount = self._fitted(amount, tokenizer)
        sequences, notes = text_ids(path, tokenizer, Frame.of(tokenizer), amount)
        return self._batches(sequences, amount), notes

    def random(self, amount: Amount, seed: int) -> Batches:
        """Batches of random tokens; special ones only where the tokenizer puts them around any text."""
        tokenizer = self._tokenizer()
        amount = self._fitted(amount, tokenizer)
        config = self._text_config()
        size = int(config.vocab_size)
        if tokenizer is None:
            special: set[Any] = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad")}
            first = getattr(config, "bos_token_id", None)
            frame = Frame((first,)) if isinstance(first, int) and 0 <= first < size else Frame()
        else:
            special = _special(tokenizer)
            size, frame = min(size, len(tokenizer)), Frame.of(tokenizer)
        vocabulary = [number for number in range(size) if number not in special]
        if not vocabulary:
            raise CheckpointError(f"{self.folder}: its vocabulary of {size} holds special tokens only")
        return self._batches(random_ids(vocabulary, frame, amount, seed), amount), []

    def _batches(self, sequences: list[Any], amount: Amount) -> list[dict[str, Any]]:
        batches = batched(sequences, amount.batch_size * amount.sequence_length)
        if getattr(self.config, "is_encoder_decoder", False):
            return [{**batch, "decoder_input_ids": batch["input_ids"]} for batch in batches]
        return batches

    def _fitted(self, amount: Amount, tokenizer: Any) -> Amount:
        """Sequences no longer than the model's positions reach."""
        limits = [getattr(self._text_config(), name, None) for name in ("max_position_embeddings", "n_positions")]
        limits.append(getattr(tokenizer, "model_max_length", None))
        known = [limit for limit in limits if isinstance(limit, int) and 0 < limit < _ANY_LENGTH]
        return replace(amount, sequence_length=min([amount.sequence_length, *known]))

    def _text_config(self) -> Any:
        """Of a model that also sees pictures, the part about text."""
        return self.config.get_text_config() if hasattr(self.config, "get_text_config") else self.config

    def _tokenizer(self) -> Any:
        """The folder's tokenizer, or None without a usable one; of some types an empty one is made from nothing."""
        import transformers

        try:
            with _speaking(self.folder):
                found = transformers.AutoTokenizer.from_pretrained(str(self.folder), local_files_only=True)
        except CheckpointError as error:
            _log.info("no tokenizer: %s", error)
            return None
        return found if len(found) > len(_special(found)) else None

    def _load(self) -> Any:
        import torch
        import transformers

        config = transformers.AutoConfig.from_pretrained(str(self.folder), local_files_only=True)
        name = next(iter(getattr(config, "architectures", None) or []), "")
        cls = getattr(transformers, name, None) or transformers.AutoModel
        dtype: Any = torch.float32 if self.device == "cpu" else "auto"
        model, loaded = cls.from_pretrained(
            str(self.folder), local_files_only=True, dtype=dtype, output_loading_info=True
        )
        if missing := sorted(loaded.get("missing_keys") or ()):
            self.notes.append(
                f"{count(len(missing), 'tensor')} of {type(model).__name__} not in the checkpoint, {missing[0]} first: "
                "set at random, as transformers does"
            )
        return model.to(self.device)


def _special(tokenizer: Any) -> set[int]:
    """Ids that stand for no text: special tokens, and those that were added, such as places for pictures."""
    return {*tokenizer.all_special_ids, *tokenizer.added_tokens_encoder.values()}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model's folder. Raises CheckpointError without a usable one."""
    path = folder / "config.json"
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "does not exist"
        raise CheckpointError(f"{folder}: {what}; give a model's folder, with config.json beside the weights")
    try:
        config = json.loads(path.read_bytes())
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}; it names the model") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: is no JSON: {error}") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: is no JSON object")
    return config


@contextmanager
def _speaking(folder: Path) -> Iterator[None]:
    """Transformers without its progress bars and warnings, and with errors of this program's family."""
    try:
        from transformers.utils import logging as voice_
    except ImportError as error:
        raise UsageError(MISSING) from error
    voice: Any = voice_
    before = voice.get_verbosity(), voice.is_progress_bar_enabled()
    voice.set_verbosity_error()
    voice.disable_progress_bar()
    try:
        yield
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ImportError) as error:
        first = (str(error) or type(error).__name__).strip().splitlines()[0]
        raise CheckpointError(
            f"{folder}: transformers cannot load it: {first}. Models that it does not know are calibrated from Python: "
            "quantloom.calibrate(model, batches)"
        ) from error
    finally:
        voice.set_verbosity(before[0])
        if before[1]:
            voice.enable_progress_bar()


def _cut_head(model: Any) -> None:
    """Takes the product with the vocabulary out: the head's input counts, its output would be gigabytes of logits."""
    import torch

    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, torch.nn.Linear):
        head.forward = lambda x: x[..., :1]  # type: ignore[method-assign,assignment]
