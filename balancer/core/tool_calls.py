"""Whether an answer asks its client to act: calls of tools or functions, in any dialect."""

from __future__ import annotations

import re

# Names and values as they stand in JSON, outside of its strings: in a string every quote is escaped.
_CALLS = re.compile(
    rb'"tool_calls"\s*:\s*(?:\[\s*)?\{'  # chat; TGI's may be one object
    rb'|"function_call"\s*:\s*\{'
    rb'|"(?:finish_reason|stop_reason)"\s*:\s*"(?:tool_calls|function_call|tool_use)"'
    rb'|"type"\s*:\s*"(?:server_)?(?:tool_use|(?:[a-z]+_)?(?:tool_|function_|mcp_|computer_)call)"'
)


def has_tool_calls(body: bytes) -> bool:
    """Whether a whole answer, unary or events, holds a call. Empty lists of calls are none."""
    # Every call has one of these in its name; two looks cost a tenth of what the expression does.
    return (b"_call" in body or b"tool_use" in body) and _CALLS.search(body) is not None
