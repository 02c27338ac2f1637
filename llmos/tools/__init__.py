"""Tool calling without I/O: which way a model writes calls, reading them out of its text as it comes, and making one certain.

How a door to clients uses it, from OpenAI's fields to llmos and back:

    `tools`, `tool_choice`, `parallel_tool_calls`   the fields of the same names in `Generate` (`Tool`; "auto", "none", "required" or
                                                    "function:NAME"). The gateway checks them, renders them into the prompt through the
                                                    model's chat template, and with the last two choices holds the output to a call
                                                    by a grammar. A model whose template knows no tools is refused (field `tools`).
    earlier calls and their answers                 `ChatMessage.tool_calls` of role assistant; role tool with `tool_call_id`, `name`.
    `response_format`                               `SamplingParams.grammar`: {"type": "json_object"} is Grammar("json_object"),
                                                    {"type": "json_schema", ...} is Grammar("json_schema", json.dumps(schema)).
                                                    Not together with "required" or a named function: one grammar holds an output.
    the answer                                      `Accepted.tool_family` says how this output writes calls (None: it was asked for
                                                    without tools, or with "none"). Then for each `Tokens.text`, and `Finished.text`:

        parser = CallParser(accepted.tool_family, names of the tools)
        for event in parser.push(text): ...         # TextPiece -> delta.content
        for event in parser.finish(): ...           # CallBegin(index, name) -> the first delta of tool_calls[index], arguments ""
                                                    # CallArguments(index, text) -> a further one with a piece of the arguments
                                                    # CallEnd(index, is_complete)

    `finish_reason` is "tool_calls" if a call came and the reason was STOP. Pieces of arguments joined are the JSON text as the model
    wrote it; whether it fits the tool's schema is certain only with a grammar. Ids are the door's to make (`call_id`: the form that
    every family's template accepts). Text that only looks like the beginning of a call comes out as text.
"""

from llmos.tools.calls import CallArguments, CallBegin, CallEnd, CallParser, Event, TextPiece
from llmos.tools.forced import check_tools, forced_grammar, is_forced, parameters_of
from llmos.tools.formats import FAMILIES, call_id, find_family

__all__ = [
    "FAMILIES",
    "CallArguments",
    "CallBegin",
    "CallEnd",
    "CallParser",
    "Event",
    "TextPiece",
    "call_id",
    "check_tools",
    "find_family",
    "forced_grammar",
    "is_forced",
    "parameters_of",
]
