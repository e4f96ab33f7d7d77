"""Conversations: the ids are the chat template's own, and messages that would render as nothing are refused."""

from __future__ import annotations

import json

import models as M
import numpy as np
import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from rmfast.texts.chat import is_messages
from rmfast.texts.inputs import InputError, encode

TURNS = [{"role": "user", "content": " hi "}, {"role": "assistant", "content": "there"}]
WITHOUT_BOS = M.TEMPLATE.replace("{{ bos_token }}", "")


def ids(inputs, tokenizer, **kw):
    return [item.ids.tolist() for item in encode(inputs, tokenizer, causal=True, vocab_size=M.VOCAB, **kw)]


def adding(single, template=M.TEMPLATE):
    made = M.tokenizer("plain")
    made.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single, special_tokens=[("<s>", M.BOS), ("</s>", M.EOS)]
    )
    made.chat_template = template
    return made


def sentencepiece(how):
    """As converters make them: a space before the text, by the normaliser or at each piece between special tokens."""
    vocab = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), *((c, -2.0) for c in "▁abcdefghijklmnopqrstuvwxyz<>\n")]
    backend = Tokenizer(models.Unigram(vocab, unk_id=0))
    if how == "legacy":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=how)
    backend.add_special_tokens(["<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", unk_token="<unk>", chat_template=M.TEMPLATE
    )


@pytest.mark.parametrize("template", [M.TEMPLATE, WITHOUT_BOS, "\n  " + M.TEMPLATE, M.TEMPLATE + "{{ bos_token }}"])
@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_templates_ids_are_its_own_whatever_the_tokenizer_adds(single, template):
    tok = adding(single, template)
    want = tok.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    assert ids([TURNS, (" hi ", "there"), {"messages": TURNS}], tok) == [want] * 3


@pytest.mark.parametrize("template", [M.TEMPLATE, WITHOUT_BOS, " " + M.TEMPLATE])
@pytest.mark.parametrize("how", ["first", "always", "never", "legacy"])
def test_a_templates_ids_are_its_own_where_tokenizers_add_a_space(how, template):
    tok = sentencepiece(how)
    tok.chat_template = template
    assert ids([TURNS], tok) == [tok.apply_chat_template(TURNS, tokenize=True, return_dict=False)]


@pytest.mark.parametrize("text", ["ab", "<s>ab", "ab</s>", "<s>ab</s>"])
@pytest.mark.parametrize("single", ["$A", "<s> $A", "$A </s>", "<s> $A </s>"])
def test_a_text_has_each_special_token_that_the_tokenizer_adds_once(single, text):
    (got,) = ids([text], adding(single))
    bos, eos = "<s>" in single or "<s>" in text, "</s>" in single or "</s>" in text
    assert got == [M.BOS] * bos + adding("$A")("ab")["input_ids"] + [M.EOS] * eos


def test_truncation_keeps_a_bos_behind_white_space():
    tok = adding("<s> $A </s>", "\n" + M.TEMPLATE)
    (got,) = encode([TURNS], tok, causal=True, vocab_size=M.VOCAB, max_length=5, truncation="left")
    assert tok.decode(got.ids) == "\n<s>re</s>"
    assert got.cut == len(ids([TURNS], tok)[0]) - 5 and got.characters == len("there")


@pytest.mark.parametrize(
    "message, reason",
    [
        ({"from": "human", "value": "hi"}, "its message 1 has no role: expected role and content, got from, value"),
        ({"role": "user"}, "its message 1 has no content"),
        ({"role": "user", "content": None}, "its message 1 has no content"),
        ({"role": None, "content": "hi"}, "its message 1 has no role"),
        ({"role": "assistant", "content": None, "tool_calls": []}, "its message 1 has no content"),
        ({"role": "user", "content": float("nan")}, "its message 1 has content nan: expected text"),
        ({"role": "user", "content": [7]}, "its message 1 has the part 7"),
        ({"role": "user", "content": [{"type": "text", "text": None}]}, "its message 1 has a part without text"),
    ],
)
def test_a_message_that_would_render_as_nothing_is_refused(message, reason):
    tok = M.tokenizer(chat=True)
    for item in ([TURNS[0], message], {"messages": [TURNS[0], message]}, ([TURNS[0], message], "there")):
        with pytest.raises(InputError, match=f"input 0: {reason}"):
            ids([item], tok)


def test_a_message_may_call_tools_in_place_of_content():
    tok = M.tokenizer(chat=True)
    tok.chat_template = "{% for m in messages %}{{ m.content or m.tool_calls[0].name }}{% endfor %}"
    assert ids([[TURNS[0], {"role": "assistant", "content": None, "tool_calls": [{"name": "add"}]}]], tok) == [
        tok(" hi add", add_special_tokens=False)["input_ids"]
    ]


PARTS = (
    "{% for m in messages %}{% for p in m.content %}{{ '<image>' if 'image' in p else p.text }}{% endfor %}{% endfor %}"
)


@pytest.mark.parametrize("make", [list, tuple, lambda parts: np.array(parts, dtype=object)])
def test_what_parquet_fills_with_none_is_not_there(make):
    tok = M.tokenizer(chat=True)
    tok.chat_template = PARTS
    filled = make([{"type": "text", "text": "ab", "image": None}, {"type": "image", "text": None, "image": "x"}])
    (got,) = encode([[{"role": "user", "content": filled, "name": None}]], tok, causal=True, vocab_size=M.VOCAB)
    assert tok.decode(got.ids) == "ab<image>" and got.characters == 2


TOOLS = [{"name": "add"}, {"name": "sub"}]
STYLED = "{{ style }}:{% for tool in tools or [] %}{{ tool.name }};{% endfor %}" + M.TEMPLATE


@pytest.mark.parametrize("form", [lambda x: x, json.dumps], ids=["values", "JSON"])
def test_the_template_is_given_kwargs_and_tools_of_the_call_and_of_a_record(form):
    tok = M.tokenizer(chat=True)
    tok.chat_template = STYLED

    def want(tools, **kwargs):
        return tok.apply_chat_template(TURNS, tools=tools, tokenize=True, return_dict=False, **kwargs)

    record = {"messages": TURNS, "tools": form(TOOLS[:1]), "chat_template_kwargs": form({"style": "own", "x": None})}
    pair = {"prompt": " hi ", "response": "there", "tools": None, "chat_template_kwargs": None}
    call = {"tools": form(TOOLS), "chat_template_kwargs": form({"style": "call"})}
    assert ids([TURNS, record, pair], tok, **call) == [
        want(TOOLS, style="call"), want(TOOLS[:1], style="own"), want(TOOLS, style="call"),
    ]  # fmt: skip


def arrays(value):
    """As pandas gives what is in Parquet: arrays for lists, inside of others too, and NumPy's numbers."""
    if isinstance(value, dict):
        return {name: arrays(each) for name, each in value.items()}
    if isinstance(value, list):
        made = np.empty(len(value), object)
        made[:] = [arrays(each) for each in value]
        return made
    return np.int64(value) if isinstance(value, int) else value


def test_arrays_are_lists_wherever_they_stand():
    calls = [{"function": {"name": "f", "arguments": {"places": ["a", "b"], "n": 3}}}, {"function": {"name": "g"}}]
    turns = [*TURNS, {"role": "assistant", "content": None, "tool_calls": calls}]
    tools = [{"type": "function", "function": {"name": "f", "required": ["places", "n"]}}]
    kwargs = {"stops": ["x", "y"]}
    template = "{{ messages | tojson }}{{ tools | tojson }}{{ stops | tojson }}"
    tok = M.tokenizer("plain")
    tok.chat_template = template
    want = ids([turns], tok, tools=tools, chat_template_kwargs=kwargs)
    assert ids([arrays(turns)], tok, tools=arrays(tools), chat_template_kwargs=arrays(kwargs)) == want
    record = {"messages": turns, "tools": tools, "chat_template_kwargs": kwargs}
    assert ids([record, arrays(record)], tok) == want * 2


@pytest.mark.parametrize("name", ["conversation", "messages", "tools", "tokenize"])
def test_what_has_its_own_argument_is_no_chat_template_kwarg(name):
    tok = M.tokenizer(chat=True)
    with pytest.raises(ValueError, match=f"^Expected chat_template_kwargs without {name}, which it can't change"):
        encode([TURNS], tok, causal=True, vocab_size=M.VOCAB, chat_template_kwargs={name: []})
    with pytest.raises(InputError, match=f"input 0: Expected chat_template_kwargs without {name}"):
        ids([{"messages": TURNS, "chat_template_kwargs": {name: []}}], tok)


@pytest.mark.parametrize("name", ["chat_template_kwargs", "tools"])
@pytest.mark.parametrize("bad", [7, "{", [7], {"tokenize": True}])
def test_wrong_kwargs_and_tools_are_refused(name, bad):
    tok = M.tokenizer(chat=True)
    with pytest.raises(ValueError, match=f"^Expected {name}"):
        ids([TURNS], tok, **{name: bad})
    with pytest.raises(InputError, match=f"input 0: Expected {name}"):
        ids([{"messages": TURNS, name: bad}], tok)


def test_an_array_without_a_dimension_is_no_conversation():
    assert not is_messages(np.array(1.5))
    assert not is_messages(np.array([]))
    assert is_messages(np.array([{"role": "user", "content": "a"}]))
