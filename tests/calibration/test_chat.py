"""Chat messages against what transformers makes of them, and one clear error for what is none."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from quantlib.calibration.chat import Chat, ChatTemplate, chat_from, template_digest
from quantlib.calibration.corpus import token_rows
from quantlib.calibration.documents import read_documents
from quantlib.errors import CorpusError

SPECIALS = ["<bos>", "<end>", "<user>", "<assistant>", "<tools>"]
WORDS = [f"w{i}" for i in range(20)]
TEMPLATE = (
    "{{ bos_token }} {% if tools %}<tools> {% for tool in tools %}{{ tool.name }} {% endfor %}{% endif %}"
    "{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<end>"
)


def chat_tokenizer(template=TEMPLATE, **roles):
    """Word i has id i; special tokens follow."""
    vocabulary = {word: i for i, word in enumerate([*WORDS, *SPECIALS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=WORDS[0]))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, **{"bos_token": "<bos>", "eos_token": "<end>", **roles}
    )
    tokenizer.chat_template = template
    return tokenizer


def messages(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]


CHATS = [messages("w1 w2", "w3"), messages("w4", "w5 w6", "w7"), messages("w8", "w9")]


def rows_of(documents, tokenizer, length, count=1):
    return token_rows(documents, tokenizer, num_sequences=count, sequence_length=length)


def chats(found=CHATS, tools=None):
    return [chat_from(messages, tools, "row") for messages in found]


def test_rows_are_the_conversations_as_transformers_tokenizes_them():
    tokenizer = chat_tokenizer()
    expected = [token for chat in CHATS for token in tokenizer.apply_chat_template(chat, return_dict=False)]
    # Each of them begins with the begin token and ends in the end token: neither is doubled.
    assert expected.count(20) == expected.count(21) == 3
    assert rows_of(chats(), tokenizer, len(expected)).flatten().tolist() == expected


@pytest.mark.parametrize(
    ("template", "separators"),
    [
        ("{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}", 2),
        ("{% for m in messages %}<{{ m.role }}> {{ m.content }} {% endfor %}<end>", 0),
        ("{{ bos_token }}{% for m in messages %} <{{ m.role }}> {{ m.content }}{% endfor %}", 0),
    ],
)
def test_separator_stands_between_conversations_that_nothing_else_parts(template, separators):
    tokenizer = chat_tokenizer(template)
    one_by_one = [tokenizer.apply_chat_template(chat, return_dict=False) for chat in CHATS]
    expected = list(one_by_one[0])
    for token_ids in one_by_one[1:]:
        expected += [21] * bool(separators) + token_ids
    assert rows_of(chats(), tokenizer, len(expected)).flatten().tolist() == expected


def test_text_is_joined_as_ever_beside_a_template():
    # Even where a text reads like a special token.
    rows = rows_of(["w1 <end>", "<bos> w2"], chat_tokenizer(), 5)
    assert rows.flatten().tolist() == [1, 21, 21, 20, 2]


def write_rows(path, rows):
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl"])
def test_messages_are_found_where_there_is_no_text_and_a_named_column_decides(tmp_path, name):
    path = tmp_path / name
    write_rows(path, [{"id": 1, "messages": chat, "talk": chat[:1]} for chat in CHATS])
    documents = read_documents(str(path))
    assert documents.column is None
    found = list(documents)
    assert [list(chat.messages) for chat in found if isinstance(chat, Chat)] == CHATS
    assert (documents.column, documents.has_chats) == ("messages", True)
    named = read_documents(str(path), "talk")
    assert [len(chat.messages) for chat in named if isinstance(chat, Chat)] == [1, 1, 1]
    with pytest.raises(CorpusError, match="no column 'text'"):
        list(read_documents(str(path), "text"))
    write_rows(path, [{"messages": chat, "text": "w1"} for chat in CHATS])
    documents = read_documents(str(path))
    assert list(documents) == ["w1"] * 3
    assert (documents.column, documents.has_chats) == ("text", False)


def test_first_row_settles_the_column_of_all_files(tmp_path):
    write_rows(tmp_path / "a.jsonl", [{"messages": CHATS[0]}])
    write_rows(tmp_path / "b.jsonl", [{"text": "w1"}])
    with pytest.raises(CorpusError, match="line 1 of .*b.jsonl has no column 'messages', it has text"):
        list(read_documents(str(tmp_path)))


@pytest.mark.parametrize("name", ["c.parquet", "c.jsonl"])
@pytest.mark.parametrize("as_text", [True, False])
def test_tools_and_other_keys_of_messages_reach_the_template(tmp_path, name, as_text):
    tools = [{"name": "w11"}, {"name": "w12"}]
    row = {
        "messages": [
            {"role": "user", "content": "w1", "extra": None},
            {"role": "assistant", "content": None, "extra": "w13"},
        ],
        "tools": json.dumps(tools) if as_text else tools,
    }
    write_rows(tmp_path / name, [row, {"messages": None, "tools": None}, {"messages": [], "tools": None}])
    (chat,) = read_documents(str(tmp_path / name))
    assert isinstance(chat, Chat)
    assert list(chat.tools) == tools
    assert list(chat.messages) == [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": None, "extra": "w13"},
    ]
    template = TEMPLATE.replace("{{ m.content }}", "{{ m.content or m.extra }}")
    assert rows_of([chat], chat_tokenizer(template), 9).tolist() == [[20, 24, 11, 12, 22, 1, 23, 13, 21]]


def test_text_parts_are_joined_and_given_as_parts_where_the_template_wants_them():
    parts = [{"type": "text", "text": "w1"}, {"text": "w2", "type": "text"}]
    (chat,) = chats([[{"role": "user", "content": parts}]])
    assert rows_of([chat], chat_tokenizer(), 5).tolist() == [[20, 22, 1, 2, 21]]
    wants_parts = TEMPLATE.replace("{{ m.content }}", "{% for p in m.content %}{{ p.text }}{% endfor %}")
    assert rows_of([chat], chat_tokenizer(wants_parts), 5).tolist() == [[20, 22, 1, 2, 21]]


def test_date_in_a_template_is_always_the_same():
    template = "{{ strftime_now('%d %b %Y') }} {% for m in messages %}{{ m.content }}{% endfor %}"
    (chat,) = chats([messages("hello")])
    assert ChatTemplate(chat_tokenizer(template)).render(chat) == "01 Jan 2025 hello"


def test_template_digest_differs_by_template():
    named = chat_tokenizer()
    named.chat_template = {"default": TEMPLATE, "tool_use": "x"}
    digests = {template_digest(found) for found in (chat_tokenizer(), chat_tokenizer("x"), named)}
    assert len(digests) == 3


@pytest.mark.parametrize(
    ("value", "tools", "said"),
    [
        ({"role": "user"}, None, "row 3 holds a dict; chat is a list of messages"),
        (["hi"], None, "a message of str"),
        ([{"from": "human", "value": "hi"}], None, r"a message of \['from', 'value'\]"),
        ([{"role": "user", "content": 7}], None, "a content that is a int"),
        ([{"role": "user", "content": [{"type": "image", "url": "x"}]}], None, "a part of kind 'image'"),
        ([{"role": "user", "content": [{"type": "text"}]}], None, "a part of kind 'text'"),
        (messages("hi"), "{", "tools in row 3 are no JSON"),
        (messages("hi"), {"name": "x"}, "tools in row 3 are a dict, a list is wanted"),
    ],
)
def test_row_that_is_no_chat_is_refused_with_its_place(value, tools, said):
    with pytest.raises(CorpusError, match=said):
        chat_from(value, tools, "row 3")


@pytest.mark.parametrize(
    ("template", "said"),
    [
        (None, "has no chat template .*chat_template.jinja"),
        ("{{ bos_token }}", "it leaves out what the user says"),
        ("{% for", "cannot be used"),
        ("{{ raise_exception('not today') }}", "not today"),
    ],
)
def test_template_that_is_missing_or_unusable_is_one_clear_error(template, said):
    with pytest.raises(CorpusError, match=said):
        rows_of(chats(), chat_tokenizer(template), 4)


def test_conversation_that_the_template_refuses_is_named():
    template = (
        "{% if messages[0].role != 'user' %}{{ raise_exception('user first') }}{% endif %}"
        "{{ messages[0].content }}"
    )
    (chat,) = chats([[{"role": "assistant", "content": "hi"}]])
    with pytest.raises(CorpusError, match="refuses row: user first"):
        rows_of([chat], chat_tokenizer(template), 4)
