"""From a run, a checkpoint or a Hugging Face folder to a small checkpoint and what it cost."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fewbits.checkpoint.hf import Stored, build_model, read_stored, stored_scheme, to_hf
from fewbits.checkpoint.manifest import MODEL
from fewbits.checkpoint.quantized import quantization_config
from fewbits.checkpoint.save import check_new, save_model
from fewbits.checkpoint.schema import dump_json
from fewbits.checkpoint.tensors import tensor_pieces
from fewbits.data.batches import Batches, eval_batches
from fewbits.data.corpus import Corpus, open_corpus
from fewbits.data.tokenizer import Tokenizer
from fewbits.data.tokens import TokenStore
from fewbits.errors import FewbitsError
from fewbits.export.measured import generation_speed, measure, paired_difference
from fewbits.export.options import DTYPES, QuantizeOptions
from fewbits.export.quantized import Quantization, quantize_model, refuse_not_finite
from fewbits.export.trained import build_trained, options_for, pack_trained, trained_precision
from fewbits.kernels.dispatch import int8_execution
from fewbits.nn.transformer import Transformer
from fewbits.precision.precision import Precision
from fewbits.precision.switches import torch_switches
from fewbits.train.config import DataConfig
from fewbits.train.evaluate import run_config
from fewbits.train.execution import choose_device
from fewbits.train.record import environment
from fewbits.train.rundir import SMALL, run_of

SCHEMA = "fewbits.quantize/1"
CALIBRATION_BATCHES, BATCH = 16, 8  # 128 sequences, as Frantar et al. 2023 take them
CALIBRATION_SEED = 1
Say = Callable[[str], None]


@dataclass
class Small:
    """A model made small, measured, and not yet saved."""

    document: dict[str, Any]
    """What quantize.json holds."""
    model: Transformer
    source: Stored
    tensors: dict[str, Tensor]
    config_json: dict[str, Any]
    options: QuantizeOptions
    config_text: str | None

    def save(self, out: Path, page: str | None = None) -> Path:
        """Writes the checkpoint, all of it or nothing, with quantize.json and the page; returns `out`."""
        files: dict[str, str | bytes] = {
            "config.json": json.dumps(self.config_json, indent=1),
            SMALL: dump_json(self.document),
            **_tokenizer_files(self.source.folder),
        }
        if page is not None:
            files["report.html"] = page
        state = {"quantized": asdict(self.options), "config": self.config_text}
        dtype = self.options.format if self.options.plain else None
        return save_model(out, self.source.step, self.tensors, state, files, dtype)


def default_out(source: Path, options: QuantizeOptions) -> Path:
    """Beside the source, under its name: runs/nano-1 becomes runs/nano-1-int4-gptq."""
    base = run_of(source) or source
    method = "" if options.method == "nearest" else f"-{options.method}"
    activations = "" if options.activations == "none" else "-activations"
    return base.absolute().parent / f"{base.absolute().name}-{options.format}{method}{activations}"


def quantize_run(
    source: Path | str,
    options: QuantizeOptions,
    calibrate: str | None = None,
    data: str | None = None,
    out: Path | None = None,
    device: str = "auto",
    eval_batches: int = 50,
    say: Say = lambda text: None,
) -> Small:
    """The model in `source` made small as `options` say, with its errors, losses and speeds before and after.

    calibrate: a corpus to calibrate on; None takes the training part of the run's own, never the held-out part. data: a
    corpus to measure on; None takes the held-out part of the run's own. out: checked, not written.

    Raises FewbitsError, before any work, for options that do not fit, a source that is quantized already or holds weights
    that are not finite, a corpus that is empty or too short, or an `out` that is there. A run that was trained for a
    quantized checkpoint (int4-qat and so on) becomes the codes that it was trained with; "before" is then that model.
    """
    source = Path(source)
    options = options_for(source, options).check()
    trained = trained_precision(source)
    if trained is not None and calibrate is not None:
        raise FewbitsError(f"{source} was trained in {trained}: its scales are known. Leave --calibrate out.")
    if out is not None:
        check_new(out)
    place = torch.device(choose_device(device).value)
    stored = read_stored(source)
    if (scheme := stored_scheme(stored.config_json)) is not None:
        raise FewbitsError(
            f"{source} is quantized already ({scheme}). Quantize the checkpoint that it was made from instead."
        )
    before = build_model(stored) if trained is None else build_trained(source, stored, trained)
    refuse_not_finite(before)
    named = (stored.folder / "tokenizer.json").is_file()
    tokenizer = Tokenizer.load(stored.folder) if named else None
    texts = _Texts(source, before, tokenizer, calibrate, data, options)
    if trained is not None:
        texts.notes.append(
            f"Before is the model as it was trained, in {trained}: it multiplies the same rounded values."
        )
    held_out = texts.held_out(eval_batches)
    before.to(place)
    with torch_switches(Precision.parse("fp32"), place):
        after = copy.deepcopy(before)
        say("quantizing")
        done = _make_small(after, options, texts) if trained is None else pack_trained(after)
        say(f"measuring on {len(held_out)} batches of {texts.measured_on}")
        document = _document(source, stored, options, done, texts, place)
        document |= _measured(before, after, held_out, tokenizer, options)
    config_json, tensors = to_hf(after.config, after.state_dict(), None if done is None else done.scheme)
    config_json["torch_dtype"] = str(next(after.parameters()).dtype).removeprefix("torch.")  # what readers compute in
    config_json |= {key: stored.config_json.get(key) for key in ("bos_token_id", "eos_token_id")}
    document["bytes_before"] = sum(file.stat().st_size for file in _weight_files(stored.folder))
    document["bytes_after"] = _file_bytes(tensors)
    config = run_config(source)
    text = None if config is None else config.to_toml()
    return Small(document, after, stored, tensors, config_json, options, text)


def _make_small(model: Transformer, options: QuantizeOptions, texts: _Texts) -> Quantization | None:
    """The model in codes, or (None) in 16 bits."""
    if not options.plain:
        return quantize_model(model, options, texts.calibration)
    limit = torch.finfo(DTYPES[options.format]).max
    for name, parameter in model.named_parameters():
        if beyond := int((parameter.abs() > limit).sum()):
            texts.notes.append(
                f"{name} has {beyond} values beyond {limit:g}, the largest of {options.format}; they are that."
            )
            parameter.data.clamp_(-limit, limit)
    model.to(DTYPES[options.format])
    return None


def _command(source: Path, options: QuantizeOptions, texts: _Texts) -> str:
    """The command line that repeats it."""
    words = [f"fewbits quantize {source} --format {options.format}"]
    standard = asdict(QuantizeOptions(format=options.format))
    for name, value in asdict(options).items():
        if value != standard[name]:
            given = ",".join(value) if isinstance(value, tuple) else value
            words.append("--no_act_order" if name == "act_order" else f"--{name} {given}")
    words += [f"--calibrate {texts.calibrated_on}"] if texts.given_text else []
    return " ".join(words + ([f"--data {texts.given_data}"] if texts.given_data else []))


class _Texts:
    """The texts to calibrate on and to measure on."""

    def __init__(
        self,
        source: Path,
        model: Transformer,
        tokenizer: Tokenizer | None,
        calibrate: str | None,
        data: str | None,
        options: QuantizeOptions,
    ):
        config = run_config(source)
        own = DataConfig() if config is None else config.data
        if tokenizer is None:
            raise FewbitsError(f"{source} holds no tokenizer.json, so no loss can be measured. Add one.")
        if config is None and options.calibrated and calibrate is None:
            raise FewbitsError(
                f"{source} does not say what it was trained on, and {options.method} needs a text. Name one with --calibrate."
            )
        self.model, self.tokenizer, self.own = model, tokenizer, own
        self.given_text, self.given_data = calibrate, data
        self.measured_on = own.data if data is None else data
        self.notes: list[str] = []
        if config is None and data is None:
            self.notes.append(f"{source} does not say what it was trained on, so the text may not be new to it.")
        self.calibrated_on = (own.data if calibrate is None else calibrate) if options.calibrated or calibrate else None
        self._store = self._open(self.measured_on, own.encoding if data is None else None)
        self.calibration: list[dict[str, Tensor]] = []
        if self.calibrated_on is not None:
            same = self.calibrated_on == self.measured_on
            store = self._store if same else self._open(self.calibrated_on, None if calibrate else own.encoding)
            self.calibration = self._calibration(store)

    def _open(self, name: str, encoding: str | None) -> TokenStore:
        corpus: Corpus = open_corpus(name, encoding)
        store = TokenStore.open_or_build(corpus, self.tokenizer, self.own.cache)
        store.check_vocabulary(self.model.config.vocab_size)
        return store

    def _calibration(self, store: TokenStore) -> list[dict[str, Tensor]]:
        """Sequences drawn from the training part, whole contexts; fewer when there is less text."""
        context, found = self.model.config.context, len(store.train)
        if found <= context:
            raise FewbitsError(
                f"The calibration corpus {self.calibrated_on!r} has {found} tokens, fewer than one context of {context} "
                "and the token after it. Name more text with --calibrate."
            )
        masked = self.own.mask_documents
        batches = Batches(store.train, store.train_documents, BATCH, context, CALIBRATION_SEED, masked)
        count = max(1, min(CALIBRATION_BATCHES, batches.windows // BATCH))
        return [batches.batch(i) for i in range(count)]

    def held_out(self, limit: int) -> list[dict[str, Tensor]]:
        """Batches of the held-out part."""
        store, context = self._store, self.model.config.context
        if len(store.val) < 2:
            raise FewbitsError(
                f"Nothing of {self.measured_on!r} is held out to measure on. Name more text with --data."
            )
        masked = self.own.mask_documents
        return list(eval_batches(store.val, store.val_documents, BATCH, context, limit, masked))


def _measured(
    before: Transformer,
    after: Transformer,
    held_out: list[dict[str, Tensor]],
    tokenizer: Tokenizer | None,
    options: QuantizeOptions,
) -> dict[str, Any]:
    """Losses and speeds of the model as it is stored, in the compute dtype, and quantized."""
    token_bytes = None if tokenizer is None else tokenizer.token_bytes
    first, second = (measure(model, held_out, token_bytes) for model in (before, after))
    dtype = options.format if options.plain else options.dtype
    stored = str(next(before.parameters()).dtype).removeprefix("torch.")
    window = held_out[0]["input_ids"][0][: max(1, before.config.context // 2)]
    models = {f"before ({stored})": before, "after": after}
    if not options.plain and next(before.parameters()).dtype != DTYPES[dtype]:
        models[f"before, in {dtype}"] = copy.deepcopy(before).to(DTYPES[dtype])
    return {
        "before": first,
        "after": second,
        "difference": paired_difference(first, second),
        "generation_tok_per_s": generation_speed(models, window),
    }


def _document(
    source: Path,
    stored: Stored,
    options: QuantizeOptions,
    done: Quantization | None,
    texts: _Texts,
    place: torch.device,
) -> dict[str, Any]:
    """quantize.json but for what is measured."""
    choices = []
    if done is not None:
        choices.append({"what": "granularity", "value": done.granularity.value, "reason": done.granularity.reason})
        embedding = "embedding and head, one tied weight" if texts.model.config.tied else "embedding"
        kept = ", ".join([embedding, *done.kept, "norms", "biases"])
        choices.append(
            {"what": "kept", "value": kept, "reason": f"stored in {options.dtype}; --keep names other layers"}
        )
    if options.activations == "int8":
        value, reason = int8_execution(place, DTYPES[options.dtype])
        choices.append({"what": "int8 matmuls", "value": value, "reason": reason})
    return {
        "schema": SCHEMA,
        "source": str(source),
        "step": stored.step,
        "options": asdict(options),
        "scheme": options.format if done is None else str(done.scheme),
        "stored_as": stored_as(done),
        "calibrated_on": texts.calibrated_on,
        "measured_on": texts.measured_on,
        "notes": texts.notes,
        "command": _command(source, options, texts),
        "device": str(place),
        "choices": choices,
        "layers": [] if done is None else done.layers,
        "environment": environment(),
    }


def stored_as(done: Quantization | None) -> str:
    """The layout on disk in a word or two."""
    if done is None:
        return "safetensors"
    config = quantization_config(done.scheme, [])
    return f"{config['quant_method']}, {config['format']}"


def _weight_files(folder: Path) -> list[Path]:
    whole = folder / MODEL
    return [whole] if whole.is_file() else sorted(folder.glob("*.safetensors"))


def _file_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The size of the file that these tensors make."""
    header = next(iter(tensor_pieces(tensors, {"format": "pt"})))
    return len(header) + sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _tokenizer_files(folder: Path) -> dict[str, str | bytes]:
    """The tokenizer of the source, byte for byte."""
    names = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.json", "merges.txt")
    return {name: (folder / name).read_bytes() for name in names if (folder / name).is_file()}
