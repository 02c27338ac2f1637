"""Every hard limit on what a peer may send, in one place. Gateways check them first, the microkernel checks them again.

Units are in the names. Raising a limit is a compatible change; lowering one is not.
"""

from __future__ import annotations

MAX_MESSAGE_BYTES = 16 * 1024 * 1024  # one wire frame, any port
MAX_CLIENT_MESSAGE_BYTES = 10 * 1024 * 1024  # one wire frame on a client port
MAX_PROMPT_BYTES = 4 * 1024 * 1024  # UTF-8 text of one prompt, or of all chat messages together
MAX_CHAT_MESSAGES = 1024
MAX_PROMPT_TOKENS = 1_048_576  # before the model's own context length is known
MAX_TOKENS = 1_048_576  # upper bound of `max_tokens` and `min_tokens`
MAX_LOGPROBS = 20
MAX_RESULT_BYTES = 8 * 1024 * 1024  # log-probabilities of one prompt; they are sent in one frame to who comes late
MAX_VECTOR = 65_536  # numbers that a text is encoded to
MAX_STOP_STRINGS = 16
MAX_STOP_STRING_CHARS = 128
MAX_STOP_TOKEN_IDS = 1024
MAX_LOGIT_BIAS = 1024
MAX_LOGIT_BIAS_ABS = 1e4
MAX_TEMPERATURE = 100.0
MAX_PENALTY_ABS = 10.0
MAX_REPETITION_PENALTY = 10.0
MAX_REQUEST_ID_CHARS = 64
MAX_GRAMMAR_BYTES = 64 * 1024  # a JSON schema, choices, a Lark or GBNF grammar
MAX_REGEX_BYTES = 4096
MAX_GRAMMAR_DEPTH = 32  # of a JSON schema
MAX_GRAMMAR_ITEMS = 2048  # schemas, properties and enum entries of a JSON schema; choices
MAX_GRAMMAR_REPEATS = 10_000  # of a part of a regular expression, nested repetitions multiplied
MAX_GRAMMAR_CPU_S = 1.0  # to compile it and to find its first token
MAX_TOOLS = 128
MAX_TOOL_NAME_CHARS = 64
MAX_TOOLS_BYTES = 256 * 1024  # names, descriptions and parameters of all tools together
MADE_UP_REQUEST_ID = (
    "auto-"  # how a `client_request_id` begins that no caller chose: it says nothing about what may be joined
)
MAX_MODEL_NAME_CHARS = 128
MAX_PEER_NAME_CHARS = 128  # what a connection calls itself
MAX_SERVICE_NAME_CHARS = 160  # executor.MODEL
MAX_IN_FLIGHT_PER_CLIENT = 1024  # requests of one client connection that have not ended
MAX_CLIENTS = 256  # connections that said hello, per gateway
MAX_FORKS = 256  # children of one fork
MAX_AFTER = 256  # sequences that one waits for
MIN_NICE = -20  # most urgent
MAX_NICE = 19
MAX_DEADLINE_MS = 7 * 24 * 3600 * 1000.0
MAX_TENANT_NAME_CHARS = 64
MAX_TENANT_WEIGHT = 1000.0  # above 0
MAX_TENANT_TOKENS_PER_S = 1e9
MAX_KV_PAGES = 2**22  # of one executor, and of its host memory; the microkernel has books on each
MAX_PAGE_SIZE = 1024
MAX_CONTEXT = 2**24  # tokens
MAX_VOCAB = 2**24
UNLIMITED = 2**31 - 1  # a tenant's pages, running or waiting sequences: the largest value, and no limit
