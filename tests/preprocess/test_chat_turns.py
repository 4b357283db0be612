"""Records of chat data in the habits that are about, and what is wrong with them, in the words of the reject."""

from __future__ import annotations

from typing import Any

import pytest

from preprocess.samples import IMAGE, VIDEO
from preprocess.sources.chat_template import PICTURE
from preprocess.sources.chat_turns import ChatError, Conversation, Habits, Named, read_conversation
from tests.preprocess.chat_inputs import llava, messages


def said(conversation: Conversation) -> list[tuple[str, str]]:
    return [(turn.role, turn.text.replace(PICTURE, "P")) for turn in conversation.turns]


def refusal(record: dict[str, Any], **settings: Any) -> tuple[str, str]:
    with pytest.raises(ChatError) as caught:
        read_conversation(record, Habits(**settings))
    return caught.value.reason, str(caught.value)


# Habits


def test_llava_records_name_one_picture_or_a_list() -> None:
    one = read_conversation(llava("<image>\nWhat?", "A cat.", image="a.jpg"))
    assert said(one) == [("user", "P\nWhat?"), ("assistant", "A cat.")] and one.media == [
        Named(IMAGE, "a.jpg")
    ]
    two = read_conversation(
        llava("<image><image> Both?", "Yes.", "And <image>?", "No.", image=["a", "b", "c"])
    )
    assert said(two)[::2] == [("user", "PP Both?"), ("user", "And P?")]
    assert [turn.media for turn in two.turns] == [(0, 1), (), (2,), ()]


def test_sharegpt_records_have_more_roles_and_a_system_beside_the_turns() -> None:
    roles = ("system", "human", "gpt", "tool", "chatgpt", "observation", "bot")
    turns = [{"from": role, "value": role} for role in roles]
    assert [role for role, _ in said(read_conversation({"conversations": turns}))] == (
        ["system", "user", "assistant", "tool", "assistant", "tool", "assistant"]
    )
    beside = read_conversation(llava("Hi", "Yes.", system="Be brief."))
    assert said(beside)[0] == ("system", "Be brief.")


def test_openai_messages_hold_parts_with_pictures_of_their_own() -> None:
    url = {"url": "data:image/png;base64,AAAA"}
    parts = [
        {"type": "text", "text": "See <image>: "},
        {"type": "image_url", "image_url": url},
        {"type": "image", "image": {"bytes": b"x", "path": None}},
        "and so on",
    ]
    asked = {"role": "user", "content": parts}
    answered = {"role": "assistant", "content": [{"type": "text", "text": "No."}]}
    conversation = read_conversation({"messages": [*messages("Hi", "Yes."), asked, answered]})
    # A marker in a part is text: parts say themselves where pictures are.
    assert said(conversation)[2:] == [("user", "See <image>: PPand so on"), ("assistant", "No.")]
    assert conversation.media == [Named(IMAGE, url), Named(IMAGE, {"bytes": b"x", "path": None})]


def test_pictures_of_a_separate_column_go_to_the_parts_in_order_or_by_index() -> None:
    def turns(*images: dict[str, Any]) -> list[Any]:
        # Tables give every part all fields.
        empty = {"text": None, "index": None, "image": None}
        content = [{**empty, "type": "text", "text": "q"}, *({**empty, "type": "image", **i} for i in images)]
        return [{"role": "user", "content": content}, {"role": "assistant", "content": "a"}]

    in_order = read_conversation({"messages": turns({}, {"image": b"own"}, {}), "images": [b"0", b"1"]})
    assert in_order.turns[0].media == (0, 2, 1) and [named.value for named in in_order.media] == [
        b"0",
        b"1",
        b"own",
    ]
    by_index = read_conversation({"messages": turns({"index": 1}, {"index": 0}), "images": [b"0", b"1"]})
    assert by_index.turns[0].media == (1, 0)
    assert (
        refusal({"messages": turns({"index": 0}, {"index": 0}), "images": [b"0", b"1"]})[0]
        == "image_count_differs"
    )


def test_videos_have_a_marker_a_field_and_parts_of_their_own() -> None:
    both = read_conversation(llava("<video> and <image>?", "Yes.", image="a", video="v"))
    assert said(both)[0] == ("user", "P and P?") and both.turns[0].media == (1, 0)
    assert both.media == [Named(IMAGE, "a"), Named(VIDEO, "v")]
    # By index, of its own, and the next one of the record's.
    parts = [
        {"type": "video", "index": 1},
        {"type": "video_url", "video_url": {"url": "own"}},
        {"type": "video"},
    ]
    asked = {"role": "user", "content": [*parts, {"type": "image"}]}
    turns = [asked, {"role": "assistant", "content": "No."}]
    in_parts = read_conversation({"messages": turns, "videos": ["v", "w"], "image": "a"})
    assert [(named.kind, named.value) for named in in_parts.media] == [
        (IMAGE, "a"),
        (VIDEO, "v"),
        (VIDEO, "w"),
        (VIDEO, {"url": "own"}),
    ]
    assert in_parts.turns[0].media == (2, 3, 1, 0)


def test_where_a_record_names_videos_alone_the_marker_of_pictures_is_theirs() -> None:
    conversation = read_conversation(llava("<image>\nWhat?", "A cat.", video="v"))
    assert conversation.media == [Named(VIDEO, "v")] and conversation.turns[0].media == (0,)
    assert refusal(llava("<image><video>", "Yes.", video="v")) == (
        "video_count_differs",
        "1 videos, 2 places for them in the turns",
    )
    assert said(read_conversation(llava("<video>", "a"), Habits(video_marker="")))[0] == ("user", "<video>")


def test_tools_come_as_objects_or_as_json() -> None:
    tools = [{"name": "look"}]
    for value in (tools, '[{"name": "look"}]'):
        assert read_conversation({"messages": messages("a", "b"), "tools": value}).tools == tools
    assert read_conversation({"messages": messages("a", "b"), "tools": ""}).tools is None
    assert refusal({"messages": messages("a", "b"), "tools": "[{"})[0] == "tools_invalid"


def test_another_marker_or_none_may_stand_for_pictures() -> None:
    record = llava("<img> <image>", "a", image="x")
    assert said(read_conversation(record, Habits(image_marker="<img>")))[0] == ("user", "P <image>")
    assert said(read_conversation(llava("<image>", "a"), Habits(image_marker="")))[0] == ("user", "<image>")


def test_pictures_without_a_place_come_first_if_that_is_wanted() -> None:
    record = llava("What?", "A cat.", image=["a", "b"], system="Be brief.")
    expected = [("system", "Be brief."), ("user", "P\nP\nWhat?"), ("assistant", "A cat.")]
    conversation = read_conversation(record, Habits(unmarked_images="first"))
    assert said(conversation) == expected and conversation.turns[1].media == (0, 1)
    # Where some have a place, all must.
    half = llava("<image> What?", "A cat.", image=["a", "b"])
    assert refusal(half, unmarked_images="first")[0] == "image_count_differs"


def test_turns_without_an_answer_are_left_out_if_that_is_wanted() -> None:
    record = llava("<image> What?", "A cat.", "And <image>?", image=["a", "b"])
    conversation = read_conversation(record, Habits(unanswered="cut"))
    assert said(conversation) == [("user", "P What?"), ("assistant", "A cat.")]
    assert refusal(record) == (
        "unanswered_turn",
        'turn 2 (user) has no answer; set unanswered = "cut" to leave it out',
    )


def test_an_assistant_that_calls_a_tool_need_say_nothing() -> None:
    turns: list[Any] = messages("a", "b", "c", "d")
    turns[1] |= {"content": None, "tool_calls": [{"name": "look"}]}
    conversation = read_conversation({"messages": turns})
    assert conversation.turns[1].text == "" and conversation.turns[1].extras == {
        "tool_calls": [{"name": "look"}]
    }


# Rejects


@pytest.mark.parametrize(
    ("record", "reason", "detail"),
    [
        ({}, "no_turns", "none of the fields conversations, messages"),
        ({"conversations": []}, "no_turns", "conversations is []"),
        ({"messages": "Hi"}, "no_turns", "messages is 'Hi'"),
        ({"messages": ["Hi"]}, "turn_not_object", "turn 0 is 'Hi'"),
        ({"messages": [{"role": "cook", "content": "x"}]}, "role_unknown", "turn 0: role is 'cook'; known: system"),
        ({"conversations": [{"from": None, "value": "x"}]}, "role_unknown", "turn 0: from is null"),
        (llava("Hi", None), "content_missing", "turn 1 (assistant): value is null or absent"),  # type: ignore[arg-type]
        ({"messages": [{"role": "user"}]}, "content_missing", "turn 0 (user): content is null or absent"),
        (llava("Hi", 17), "content_not_text", "turn 1 (assistant): value is 17"),  # type: ignore[arg-type]
        ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "content_not_text", "a text part holds null"),
        ({"messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "part_unknown", "a part of type 'audio'"),
        ({"messages": [{"role": "user", "content": [3]}]}, "part_unknown", "turn 0: a part of type null"),
        (llava("Hi", " \n"), "turn_empty", "turn 1 (assistant) has no text"),
        (llava("", "Hi"), "turn_empty", "turn 0 (user) has no text"),
        (llava("Hi"), "no_assistant_turn", "1 turns: user"),
        (llava("Hi", "a\ufdd0b"), "reserved_character", "turn 1: U+FDD0"),
        ({"messages": [{"role": "user", "content": ["\ufdef"]}]}, "reserved_character", "turn 0: U+FDEF"),
        (llava("Hi", "Yes.", image="a"), "image_count_differs", "1 images, 0 places"),
        (llava("<image><image>", "Yes.", image="a"), "image_count_differs", "1 images, 2 places"),
        (llava("<image>", "<image>", image="a"), "image_count_differs", "1 images, 2 places"),
        (llava("<image>", "Yes.", image=[]), "image_count_differs", "0 images, 1 places"),
        (llava("<video>", "Yes."), "video_count_differs", "0 videos, 1 places"),
        (llava("<image>", "Yes.", image="a", video="v"), "video_count_differs", "1 videos, 0 places"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(record: dict[str, Any], reason: str, detail: str) -> None:
    found = refusal(record)
    assert found[0] == reason and detail in found[1]


def test_a_question_of_a_picture_alone_is_one_and_a_system_may_be_silent() -> None:
    assert said(read_conversation(llava("<image>", "A cat.", image="a")))[0] == ("user", "P")
    assert said(read_conversation({"messages": [{"role": "system", "content": ""}, *messages("a", "b")]}))[
        0
    ] == (("system", ""))
