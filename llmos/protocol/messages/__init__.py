"""Every message on every llmos port, as frozen typed structs. `../spec.md` is the prose version.

On the wire a message is one msgpack array `[type, fields...]` in one frame. Rules of evolution: types and fields are only
appended, an appended field has a default, a number is never reused; the schema hash (codec.py) covers all of it.
Token ids and page ids travel as little-endian int32 blobs (`pack_i32`), not as lists: a 256-row plan costs ~1 us to pack.

Groups (one file each): handshake 1-9 | client port 10-39 | text port 40-59 | kernel port, sequences 60-79 | kernel port, control 80-99 |
        executors 100-119 | supervisor port 120-139 | kernel port, more control 140-159 | measures 180-181.
"""

from __future__ import annotations

from llmos.protocol.messages.base import (
    Error,
    Hello,
    Message,
    Part,
    Welcome,
)
from llmos.protocol.messages.client import (
    Accepted,
    Ack,
    Append,
    Appended,
    Attach,
    Cancel,
    ChatMessage,
    Continue,
    Detokenize,
    Detokenized,
    Embed,
    Embedded,
    Finished,
    Generate,
    PromptLogprobs,
    Spawn,
    Spawned,
    Tokenize,
    Tokenized,
    TokenLogprobs,
    Tokens,
    Tool,
    ToolCall,
    Usage,
)
from llmos.protocol.messages.control import (
    After,
    Close,
    Deadline,
    Done,
    Explain,
    Explained,
    Fork,
    Forked,
    JobRow,
    Kill,
    Killed,
    LaneStatus,
    ModelRow,
    ModelsGet,
    ModelsReply,
    ModelState,
    Nice,
    PsGet,
    PsReply,
    RecordWrite,
    RecordWritten,
    RestartService,
    Resume,
    SeqRow,
    ServiceStatus,
    Stat,
    Stats,
    StatusGet,
    StatusReply,
    Suspend,
    TenantLimitsRow,
    TenantRow,
    TenantSet,
    TenantsGet,
    TenantsReply,
    TenantsStored,
    TenantStore,
    Wait,
    Waited,
)
from llmos.protocol.messages.measures import (
    EndedRow,
    HistogramRow,
    LaneMeasures,
    MeasuresGet,
    MeasuresReply,
)
from llmos.protocol.messages.sequences import (
    ResultEntry,
    SeqAccepted,
    SeqAck,
    SeqAppend,
    SeqAppended,
    SeqAttach,
    SeqAttached,
    SeqCancel,
    SeqContinue,
    SeqDetach,
    SeqEnd,
    SeqFinish,
    SeqReplaced,
    SeqSpawn,
    SeqSubmit,
    SeqTokens,
    TokenEntry,
)
from llmos.protocol.messages.steps import (
    ExecutorReady,
    ExecutorWelcome,
    RowAdd,
    RowLogprobs,
    RowResult,
    StepPlan,
    StepResult,
)
from llmos.protocol.messages.supervision import (
    Drain,
    Draining,
    Heartbeat,
    KernelRestarted,
    KillService,
    ServiceDown,
    ServiceFailed,
    ServiceReady,
    ServiceReport,
    Stop,
)
from llmos.protocol.messages.text import (
    DecodeClose,
    Decoded,
    DecodedItem,
    DecodeItem,
    DecodeOpen,
    DecodeStep,
    Encode,
    Encoded,
    ModelInfo,
    ModelInfoGet,
    ModelInfoList,
    Render,
    Rendered,
    ToolFormat,
)
from llmos.protocol.params import SamplingParams

ControlVerb = (
    PsGet
    | Kill
    | StatusGet
    | ModelsGet
    | Nice
    | Suspend
    | Resume
    | Explain
    | TenantsGet
    | TenantSet
    | Fork
    | Wait
    | Stat
    | Close
    | Deadline
    | After
    | RecordWrite
    | RestartService
    | MeasuresGet
)
ControlAnswer = (
    PsReply
    | Killed
    | StatusReply
    | ModelsReply
    | Done
    | Explained
    | TenantsReply
    | Forked
    | Waited
    | Stats
    | RecordWritten
    | MeasuresReply
)
ClientToGateway = (
    Hello | Generate | Spawn | Append | Continue | Attach | Ack | Cancel | Tokenize | Detokenize | Embed | ControlVerb
)
GatewayToClient = (
    Welcome
    | Error
    | Accepted
    | Tokens
    | Finished
    | Spawned
    | Appended
    | Tokenized
    | Detokenized
    | Embedded
    | PromptLogprobs
    | ControlAnswer
)
GatewayToTokenizer = Hello | ModelInfoGet | Encode | DecodeOpen | DecodeStep | DecodeClose | Render
TokenizerToGateway = Welcome | Error | ModelInfoList | Encoded | Decoded | Rendered
ToKernel = (
    Hello
    | SeqSubmit
    | SeqSpawn
    | SeqAppend
    | SeqContinue
    | SeqAttach
    | SeqDetach
    | SeqCancel
    | SeqFinish
    | SeqAck
    | ControlVerb
    | ModelsReply
    | TenantsStored
    | ExecutorReady
    | StepResult
    | ServiceReport
    | ServiceDown
    | Drain
)
FromKernel = (
    Welcome
    | Error
    | SeqAccepted
    | SeqAppended
    | SeqAttached
    | SeqReplaced
    | SeqTokens
    | ControlAnswer
    | ModelsGet
    | ModelState
    | TenantStore
    | ExecutorWelcome
    | StepPlan
    | RestartService
    | Draining
    | KillService
)
ToSupervisor = Hello | ServiceReady | Heartbeat | ServiceFailed
FromSupervisor = Welcome | Error | Stop | KernelRestarted

__all__ = [
    "Accepted",
    "Ack",
    "After",
    "Append",
    "Appended",
    "Attach",
    "Cancel",
    "ChatMessage",
    "ClientToGateway",
    "Close",
    "Continue",
    "ControlAnswer",
    "ControlVerb",
    "Deadline",
    "DecodeClose",
    "DecodeItem",
    "DecodeOpen",
    "DecodeStep",
    "Decoded",
    "DecodedItem",
    "Detokenize",
    "Detokenized",
    "Done",
    "Drain",
    "Draining",
    "Embed",
    "Embedded",
    "Encode",
    "Encoded",
    "EndedRow",
    "Error",
    "ExecutorReady",
    "ExecutorWelcome",
    "Explain",
    "Explained",
    "Finished",
    "Fork",
    "Forked",
    "FromKernel",
    "FromSupervisor",
    "GatewayToClient",
    "GatewayToTokenizer",
    "Generate",
    "Heartbeat",
    "Hello",
    "HistogramRow",
    "JobRow",
    "KernelRestarted",
    "Kill",
    "KillService",
    "Killed",
    "LaneMeasures",
    "LaneStatus",
    "MeasuresGet",
    "MeasuresReply",
    "Message",
    "ModelInfo",
    "ModelInfoGet",
    "ModelInfoList",
    "ModelRow",
    "ModelState",
    "ModelsGet",
    "ModelsReply",
    "Nice",
    "Part",
    "PromptLogprobs",
    "PsGet",
    "PsReply",
    "RecordWrite",
    "RecordWritten",
    "Render",
    "Rendered",
    "RestartService",
    "ResultEntry",
    "Resume",
    "RowAdd",
    "RowLogprobs",
    "RowResult",
    "SamplingParams",
    "SeqAccepted",
    "SeqAck",
    "SeqAppend",
    "SeqAppended",
    "SeqAttach",
    "SeqAttached",
    "SeqCancel",
    "SeqContinue",
    "SeqDetach",
    "SeqEnd",
    "SeqFinish",
    "SeqReplaced",
    "SeqRow",
    "SeqSpawn",
    "SeqSubmit",
    "SeqTokens",
    "ServiceDown",
    "ServiceFailed",
    "ServiceReady",
    "ServiceReport",
    "ServiceStatus",
    "Spawn",
    "Spawned",
    "Stat",
    "Stats",
    "StatusGet",
    "StatusReply",
    "StepPlan",
    "StepResult",
    "Stop",
    "Suspend",
    "TenantLimitsRow",
    "TenantRow",
    "TenantSet",
    "TenantStore",
    "TenantsGet",
    "TenantsReply",
    "TenantsStored",
    "ToKernel",
    "ToSupervisor",
    "TokenEntry",
    "TokenLogprobs",
    "Tokenize",
    "Tokenized",
    "TokenizerToGateway",
    "Tokens",
    "Tool",
    "ToolCall",
    "ToolFormat",
    "Usage",
    "Wait",
    "Waited",
    "Welcome",
]
