"""Exported models in the transformers library compute what ours do (extra `transformers`)."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from archerchat.evals.lm_eval_adapter import HarnessModel
from archerchat.exchange.huggingface import OURS, PLAIN, THEIRS, write_folder
from archerchat.inference.loading import LoadedModel
from archerchat.model.config import ModelConfig
from archerchat.model.transformer import Transformer
from archerchat.tokenizer.bpe import Tokenizer, load_ranks, train_tokenizer
from archerchat.tokenizer.chat_format import render_conversation, render_for_completion

pytest.importorskip("transformers")

WHOLE = ModelConfig(256, 300, 3, 4, 2, 64, "SL")
SHAPES = {"whole": WHOLE} | {
    name: replace(WHOLE, **{name: value}) for name, value in PLAIN.items() if name != "qk_gain"
}


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return train_tokenizer([Path(__file__).read_text()], 300)


def build(config: ModelConfig) -> Transformer:
    """Return a model whose every weight matters."""
    model = Transformer(config)
    model.init_weights(0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def export(folder: Path, model: Transformer, tokenizer: Tokenizer, kind: str = OURS) -> Path:
    about: dict[str, Any] = {"stage": "sft", "step": 1}
    write_folder(
        folder, model.state_dict(), model.config, tokenizer, "card", about, model_type=kind
    )
    return folder


def load(folder: Path, **options: Any) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)


@pytest.fixture(scope="module", autouse=True)
def _modules_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the library's copies of the modelling file out of the user's home."""
    with pytest.MonkeyPatch.context() as patch:
        place = str(tmp_path_factory.mktemp("modules"))
        patch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", place)
        yield


@pytest.fixture(scope="module")
def model() -> Transformer:
    return build(WHOLE)


@pytest.fixture(scope="module")
def exported(
    model: Transformer, tokenizer: Tokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return export(tmp_path_factory.mktemp("export") / "model", model, tokenizer)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(0, 291, (2, 300), generator=torch.Generator().manual_seed(2))


def logits(model: Any, *args: Any, **options: Any) -> Tensor:
    with torch.no_grad():
        out: Tensor = model(*args, **options).logits
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_logits_equal_ours(name: str, tokenizer: Tokenizer, tmp_path: Path, ids: Tensor) -> None:
    """Beyond the context too, where windows slide."""
    model = build(SHAPES[name])
    theirs = load(export(tmp_path / "model", model, tokenizer))
    torch.testing.assert_close(logits(theirs, ids), model(ids), atol=1e-5, rtol=1e-5)


def test_a_plain_model_loads_without_our_code(
    tokenizer: Tokenizer, tmp_path: Path, ids: Tensor
) -> None:
    pytest.importorskip("transformers.models.nanochat")  # since version 5
    from transformers import AutoModelForCausalLM

    model = build(replace(WHOLE, **PLAIN, window_pattern="L"))
    folder = export(tmp_path / "model", model, tokenizer, THEIRS)
    theirs = AutoModelForCausalLM.from_pretrained(folder)
    assert type(theirs).__name__ == "NanoChatForCausalLM"
    ids = ids[:, :256]  # the library's layers see everything; ours as much as the context
    torch.testing.assert_close(logits(theirs, ids), model(ids), atol=1e-5, rtol=1e-5)


def test_cached_in_pieces_equals_uncached(exported: Path, ids: Tensor) -> None:
    theirs = load(exported)
    whole, pieces, cache = logits(theirs, ids, use_cache=False), [], None
    for piece in ids.split([10, 1, 1, 188, 100], dim=1):
        with torch.no_grad():
            out = theirs(piece, past_key_values=cache, use_cache=True)
        pieces.append(out.logits)
        cache = out.past_key_values
    torch.testing.assert_close(torch.cat(pieces, 1), whole, atol=1e-5, rtol=1e-5)


def greedy(model: Transformer, row: Tensor, count: int) -> Tensor:
    for _ in range(count):
        row = torch.cat([row, model(row)[:, -1:].argmax(-1)], dim=1)
    return row


def test_greedy_tokens_equal_ours_in_a_padded_batch(
    exported: Path, model: Transformer, ids: Tensor
) -> None:
    """With a cache that grows, one of fixed size, beams, and without any."""
    theirs, bos = load(exported), 291
    padded, mask = ids[:, :40].clone(), torch.ones(2, 40, dtype=torch.long)
    padded[1, :15], mask[1, :15] = bos, 0
    given: dict[str, Any] = {"attention_mask": mask, "do_sample": False, "eos_token_id": None}
    made = theirs.generate(padded, max_new_tokens=12, **given)
    assert torch.equal(made[:1], greedy(model, padded[:1], 12))
    assert torch.equal(made[1:, 15:], greedy(model, padded[1:, 15:], 12))
    still = {"cache_implementation": "static", "disable_compile": True}
    assert torch.equal(theirs.generate(padded, max_new_tokens=12, **still, **given), made)
    beams = [
        theirs.generate(padded, max_new_tokens=8, num_beams=3, use_cache=cached, **given)
        for cached in (True, False)
    ]
    assert torch.equal(*beams)


def test_a_static_cache_takes_a_mask_of_the_ids_alone(exported: Path, ids: Tensor) -> None:
    from transformers import StaticCache

    theirs, mask = load(exported), torch.ones(2, 20, dtype=torch.long)
    mask[1, :5] = 0
    cache = StaticCache(config=theirs.config, max_cache_len=64)
    given = {"attention_mask": mask, "past_key_values": cache}
    expected = logits(theirs, ids[:, :20], attention_mask=mask)
    torch.testing.assert_close(logits(theirs, ids[:, :20], **given), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_gradients_equal_ours(
    exported: Path, model: Transformer, ids: Tensor, checkpointing: bool
) -> None:
    theirs = load(exported).train()
    if checkpointing:
        theirs.gradient_checkpointing_enable()
    theirs(ids, labels=ids).loss.backward()
    own = build(WHOLE)
    F.cross_entropy(own(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten()).backward()
    expected = {name: parameter.grad for name, parameter in own.named_parameters()}
    for name, parameter in theirs.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-5, rtol=1e-3, msg=name)


def test_it_compiles_in_one_piece(exported: Path, ids: Tensor) -> None:
    theirs = load(exported)
    compiled = torch.compile(theirs, fullgraph=True, backend="eager")
    expected = logits(theirs, ids)
    torch.testing.assert_close(logits(compiled, ids), expected)


def test_a_longer_vocabulary_is_refused_before_anything_changes(exported: Path) -> None:
    """The value embeddings would keep their length, so a new token would be out of range."""
    model = load(exported)
    before = model.token_embedding
    with pytest.raises(NotImplementedError):
        model.resize_token_embeddings(WHOLE.vocab_size + 100)
    with pytest.raises(NotImplementedError):
        model.set_input_embeddings(torch.nn.Embedding(400, WHOLE.model_dim))
    assert model.get_input_embeddings() is before


def test_bfloat16_works_and_float16_is_refused(
    exported: Path, model: Transformer, ids: Tensor
) -> None:
    theirs = load(exported, dtype=torch.bfloat16)
    assert theirs.residual_lambdas.dtype == torch.float32
    own = Transformer(WHOLE, torch.bfloat16)
    own.load_state_dict(model.state_dict())
    torch.testing.assert_close(logits(theirs, ids), own(ids).detach(), atol=0.15, rtol=0)
    with pytest.raises(ValueError, match="overflows in float16"):
        load(exported, dtype=torch.float16)(ids)


def load_tokenizer(folder: Path) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder)


def test_every_code_point_gets_our_ids(exported: Path, tokenizer: Tokenizer) -> None:
    theirs = load_tokenizer(exported)
    for start in range(0, 0x110000, 0x800):
        if not 0xD800 <= start < 0xE000:
            text = "".join(
                f"a{chr(c)} '{chr(c)}{chr(c)}\n1{chr(c)}" for c in range(start, start + 96)
            )
            assert theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text)


def test_goldens_get_their_ids(oracle_dir: Path, shared_data_dir: Path, tmp_path: Path) -> None:
    """The spelling of special tokens included; and so does a megabyte of text."""
    pq = pytest.importorskip("pyarrow.parquet")
    ranks = load_ranks(oracle_dir / "tokenizer" / "mergeable_ranks.tiktoken")
    golden = Tokenizer(ranks)
    model = build(ModelConfig(16, 4096, 1, 1, 1, 32))
    theirs = load_tokenizer(export(tmp_path / "model", model, golden))
    for case in json.loads((oracle_dir / "tokenizer_goldens.json").read_text())["cases"]:
        assert theirs(case["text"], add_special_tokens=False)["input_ids"] == case["ids"]
        assert theirs.decode(case["ids"]) == golden.decode(case["ids"])
    characters = 0
    for text in pq.read_table(sorted(shared_data_dir.glob("pretrain/*.parquet"))[0])["text"]:
        characters += len(text.as_py())
        assert theirs(text.as_py())["input_ids"] == [4087, *golden.encode(text.as_py())]
        if characters > 1_000_000:
            break
    cases = json.loads((oracle_dir / "render_goldens.json").read_text())["cases"]
    for case in cases:
        if "conversation" in case:  # one is a recipe
            check_template(theirs, golden, case["conversation"])


CONVERSATION = {
    "messages": [
        {"role": "system", "content": "Say <|assistant_end|> never."},
        {"role": "user", "content": "What is <|bos|>? \n"},
        {
            "role": "assistant",
            "content": [
                {"type": "text", "text": "A sum: "},
                {"type": "python", "text": "1+1"},
                {"type": "python_output", "text": "2"},
            ],
        },
        {"role": "user", "content": "\ufdd0<|bos|>"},
    ]
}


def check_template(theirs: Any, tokenizer: Tokenizer, conversation: Mapping[str, Any]) -> None:
    messages = conversation["messages"]
    whole, _ = render_conversation(tokenizer, conversation, 10**6)
    assert theirs.apply_chat_template(messages, return_dict=False) == whole
    if messages[-1]["role"] == "user":
        asked = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert asked == render_for_completion(tokenizer, conversation, 10**6)


def test_the_template_renders_as_we_do(exported: Path, tokenizer: Tokenizer) -> None:
    """The spelling of a special token stays text, the mark before it included."""
    theirs = load_tokenizer(exported)
    check_template(theirs, tokenizer, {"messages": CONVERSATION["messages"][:-1]})
    ids = theirs.apply_chat_template(CONVERSATION["messages"], return_dict=False)
    assert ids.count(tokenizer.bos_id) == 1
    assert theirs("hi")["input_ids"] == [tokenizer.bos_id, *tokenizer.encode("hi")]
    turned = list(reversed(CONVERSATION["messages"][1:3]))
    with pytest.raises(Exception, match="user and assistant take turns"):
        theirs.apply_chat_template(turned)


def test_the_harness_scores_the_folder_as_our_adapter_does(
    exported: Path, model: Transformer, tokenizer: Tokenizer, shared_data_dir: Path
) -> None:
    """lm-evaluation-harness's plain `hf` model, on part of ARC-Easy."""
    harness = pytest.importorskip("lm_eval.models.huggingface")
    instance = pytest.importorskip("lm_eval.api.instance").Instance
    (path,) = (shared_data_dir / "core").rglob("arc_easy.jsonl")
    lines = path.read_text().splitlines()
    rows = [json.loads(line) for line in lines[:4]]
    pairs = [(row["query"], f" {choice}") for row in rows for choice in row["choices"]]
    requests = [instance("loglikelihood", {}, pair, i) for i, pair in enumerate(pairs)]
    loaded = LoadedModel(model, tokenizer, exported, 0, {})
    ours = HarnessModel(loaded=loaded).loglikelihood(requests)
    options = {"trust_remote_code": True, "device": "cpu", "max_length": 2048, "batch_size": 4}
    theirs = harness.HFLM(str(exported), **options).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in theirs] == [greedy for _, greedy in ours]
    expected = [total for total, _ in ours]
    assert [total for total, _ in theirs] == pytest.approx(expected, abs=1e-3)


def test_a_pipeline_answers(exported: Path) -> None:
    from transformers import pipeline

    answer = pipeline("text-generation", model=str(exported), trust_remote_code=True)
    (said,) = answer([{"role": "user", "content": "Hi"}], max_new_tokens=4, do_sample=False)
    assert said["generated_text"][-1]["role"] == "assistant"


@pytest.mark.slow
def test_the_benchmark_ends_with_its_figures() -> None:
    script = Path(__file__).resolve().parents[3] / "benchmarks" / "export.py"
    sizes = ["--depth", "2", "--vocab-size", "512", "--tokens", "4", "--max-seq-len", "128"]
    done = subprocess.run(
        [sys.executable, script, *sizes], capture_output=True, text=True, check=False, timeout=200
    )
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["max_logit_difference"] < 1e-4
    assert figures["tokens_equal"]
    assert figures["round_trip_equal"]
