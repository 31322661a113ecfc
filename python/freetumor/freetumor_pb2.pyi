from google.protobuf.internal import containers as _containers
from google.protobuf.internal import enum_type_wrapper as _enum_type_wrapper
from google.protobuf import descriptor as _descriptor
from google.protobuf import message as _message
from collections.abc import Iterable as _Iterable, Mapping as _Mapping
from typing import ClassVar as _ClassVar, Optional as _Optional, Union as _Union

DESCRIPTOR: _descriptor.FileDescriptor

class Pool(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    POOL_UNSPECIFIED: _ClassVar[Pool]
    POOL_LABELLED_REAL: _ClassVar[Pool]
    POOL_LABELLED_HOST: _ClassVar[Pool]
    POOL_UNLABELLED_HOST: _ClassVar[Pool]

class Outcome(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    OUTCOME_UNSPECIFIED: _ClassVar[Outcome]
    OUTCOME_REAL: _ClassVar[Outcome]
    OUTCOME_ACCEPTED: _ClassVar[Outcome]
    OUTCOME_HEALTHY_AFTER_K: _ClassVar[Outcome]
    OUTCOME_BEST_AFTER_K: _ClassVar[Outcome]
    OUTCOME_REAL_AFTER_K: _ClassVar[Outcome]
    OUTCOME_UNPLACEABLE: _ClassVar[Outcome]

class SizeClass(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    SIZE_CLASS_UNSPECIFIED: _ClassVar[SizeClass]
    SIZE_CLASS_TINY: _ClassVar[SizeClass]
    SIZE_CLASS_SMALL: _ClassVar[SizeClass]
    SIZE_CLASS_MEDIUM: _ClassVar[SizeClass]
    SIZE_CLASS_LARGE: _ClassVar[SizeClass]

class ContrastBin(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CONTRAST_BIN_UNSPECIFIED: _ClassVar[ContrastBin]
    CONTRAST_BIN_DARK: _ClassVar[ContrastBin]
    CONTRAST_BIN_DIM: _ClassVar[ContrastBin]
    CONTRAST_BIN_ISO: _ClassVar[ContrastBin]
    CONTRAST_BIN_BRIGHT: _ClassVar[ContrastBin]

class EndReason(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    END_REASON_UNSPECIFIED: _ClassVar[EndReason]
    END_REASON_END_OF_EPOCH: _ClassVar[EndReason]
    END_REASON_COUNT: _ClassVar[EndReason]
    END_REASON_SHUTDOWN: _ClassVar[EndReason]
    END_REASON_REBALANCE: _ClassVar[EndReason]

class ElementType(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    ELEMENT_TYPE_UNSPECIFIED: _ClassVar[ElementType]
    ELEMENT_TYPE_U8: _ClassVar[ElementType]
    ELEMENT_TYPE_I16: _ClassVar[ElementType]
    ELEMENT_TYPE_F16: _ClassVar[ElementType]
    ELEMENT_TYPE_F32: _ClassVar[ElementType]

class Codec(int, metaclass=_enum_type_wrapper.EnumTypeWrapper):
    __slots__ = ()
    CODEC_RAW: _ClassVar[Codec]
    CODEC_ZSTD: _ClassVar[Codec]
POOL_UNSPECIFIED: Pool
POOL_LABELLED_REAL: Pool
POOL_LABELLED_HOST: Pool
POOL_UNLABELLED_HOST: Pool
OUTCOME_UNSPECIFIED: Outcome
OUTCOME_REAL: Outcome
OUTCOME_ACCEPTED: Outcome
OUTCOME_HEALTHY_AFTER_K: Outcome
OUTCOME_BEST_AFTER_K: Outcome
OUTCOME_REAL_AFTER_K: Outcome
OUTCOME_UNPLACEABLE: Outcome
SIZE_CLASS_UNSPECIFIED: SizeClass
SIZE_CLASS_TINY: SizeClass
SIZE_CLASS_SMALL: SizeClass
SIZE_CLASS_MEDIUM: SizeClass
SIZE_CLASS_LARGE: SizeClass
CONTRAST_BIN_UNSPECIFIED: ContrastBin
CONTRAST_BIN_DARK: ContrastBin
CONTRAST_BIN_DIM: ContrastBin
CONTRAST_BIN_ISO: ContrastBin
CONTRAST_BIN_BRIGHT: ContrastBin
END_REASON_UNSPECIFIED: EndReason
END_REASON_END_OF_EPOCH: EndReason
END_REASON_COUNT: EndReason
END_REASON_SHUTDOWN: EndReason
END_REASON_REBALANCE: EndReason
ELEMENT_TYPE_UNSPECIFIED: ElementType
ELEMENT_TYPE_U8: ElementType
ELEMENT_TYPE_I16: ElementType
ELEMENT_TYPE_F16: ElementType
ELEMENT_TYPE_F32: ElementType
CODEC_RAW: Codec
CODEC_ZSTD: Codec

class Cursor(_message.Message):
    __slots__ = ("recipe", "snapshot", "bundle", "revision", "next_index")
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    NEXT_INDEX_FIELD_NUMBER: _ClassVar[int]
    recipe: str
    snapshot: str
    bundle: str
    revision: int
    next_index: int
    def __init__(self, recipe: _Optional[str] = ..., snapshot: _Optional[str] = ..., bundle: _Optional[str] = ..., revision: _Optional[int] = ..., next_index: _Optional[int] = ...) -> None: ...

class StreamHeader(_message.Message):
    __slots__ = ("protocol", "recipe", "snapshot", "bundle", "revision", "recipe_json", "labels", "window_low_hu", "window_high_hu", "spacing_mm", "patch", "patches_per_epoch", "batches", "rank", "world", "batch_size", "numerics", "first_index")
    class LabelsEntry(_message.Message):
        __slots__ = ("key", "value")
        KEY_FIELD_NUMBER: _ClassVar[int]
        VALUE_FIELD_NUMBER: _ClassVar[int]
        key: str
        value: int
        def __init__(self, key: _Optional[str] = ..., value: _Optional[int] = ...) -> None: ...
    PROTOCOL_FIELD_NUMBER: _ClassVar[int]
    RECIPE_FIELD_NUMBER: _ClassVar[int]
    SNAPSHOT_FIELD_NUMBER: _ClassVar[int]
    BUNDLE_FIELD_NUMBER: _ClassVar[int]
    REVISION_FIELD_NUMBER: _ClassVar[int]
    RECIPE_JSON_FIELD_NUMBER: _ClassVar[int]
    LABELS_FIELD_NUMBER: _ClassVar[int]
    WINDOW_LOW_HU_FIELD_NUMBER: _ClassVar[int]
    WINDOW_HIGH_HU_FIELD_NUMBER: _ClassVar[int]
    SPACING_MM_FIELD_NUMBER: _ClassVar[int]
    PATCH_FIELD_NUMBER: _ClassVar[int]
    PATCHES_PER_EPOCH_FIELD_NUMBER: _ClassVar[int]
    BATCHES_FIELD_NUMBER: _ClassVar[int]
    RANK_FIELD_NUMBER: _ClassVar[int]
    WORLD_FIELD_NUMBER: _ClassVar[int]
    BATCH_SIZE_FIELD_NUMBER: _ClassVar[int]
    NUMERICS_FIELD_NUMBER: _ClassVar[int]
    FIRST_INDEX_FIELD_NUMBER: _ClassVar[int]
    protocol: int
    recipe: str
    snapshot: str
    bundle: str
    revision: int
    recipe_json: str
    labels: _containers.ScalarMap[str, int]
    window_low_hu: float
    window_high_hu: float
    spacing_mm: _containers.RepeatedScalarFieldContainer[float]
    patch: _containers.RepeatedScalarFieldContainer[int]
    patches_per_epoch: int
    batches: int
    rank: int
    world: int
    batch_size: int
    numerics: str
    first_index: int
    def __init__(self, protocol: _Optional[int] = ..., recipe: _Optional[str] = ..., snapshot: _Optional[str] = ..., bundle: _Optional[str] = ..., revision: _Optional[int] = ..., recipe_json: _Optional[str] = ..., labels: _Optional[_Mapping[str, int]] = ..., window_low_hu: _Optional[float] = ..., window_high_hu: _Optional[float] = ..., spacing_mm: _Optional[_Iterable[float]] = ..., patch: _Optional[_Iterable[int]] = ..., patches_per_epoch: _Optional[int] = ..., batches: _Optional[int] = ..., rank: _Optional[int] = ..., world: _Optional[int] = ..., batch_size: _Optional[int] = ..., numerics: _Optional[str] = ..., first_index: _Optional[int] = ...) -> None: ...

class Tensor(_message.Message):
    __slots__ = ("name", "element", "shape", "offset", "stored_length", "raw_length", "codec", "crc32")
    NAME_FIELD_NUMBER: _ClassVar[int]
    ELEMENT_FIELD_NUMBER: _ClassVar[int]
    SHAPE_FIELD_NUMBER: _ClassVar[int]
    OFFSET_FIELD_NUMBER: _ClassVar[int]
    STORED_LENGTH_FIELD_NUMBER: _ClassVar[int]
    RAW_LENGTH_FIELD_NUMBER: _ClassVar[int]
    CODEC_FIELD_NUMBER: _ClassVar[int]
    CRC32_FIELD_NUMBER: _ClassVar[int]
    name: str
    element: ElementType
    shape: _containers.RepeatedScalarFieldContainer[int]
    offset: int
    stored_length: int
    raw_length: int
    codec: Codec
    crc32: int
    def __init__(self, name: _Optional[str] = ..., element: _Optional[_Union[ElementType, str]] = ..., shape: _Optional[_Iterable[int]] = ..., offset: _Optional[int] = ..., stored_length: _Optional[int] = ..., raw_length: _Optional[int] = ..., codec: _Optional[_Union[Codec, str]] = ..., crc32: _Optional[int] = ...) -> None: ...

class GateScores(_message.Message):
    __slots__ = ("recall", "precision", "before", "recall_threshold", "precision_threshold", "realism_threshold")
    RECALL_FIELD_NUMBER: _ClassVar[int]
    PRECISION_FIELD_NUMBER: _ClassVar[int]
    BEFORE_FIELD_NUMBER: _ClassVar[int]
    RECALL_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    PRECISION_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    REALISM_THRESHOLD_FIELD_NUMBER: _ClassVar[int]
    recall: float
    precision: float
    before: float
    recall_threshold: float
    precision_threshold: float
    realism_threshold: float
    def __init__(self, recall: _Optional[float] = ..., precision: _Optional[float] = ..., before: _Optional[float] = ..., recall_threshold: _Optional[float] = ..., precision_threshold: _Optional[float] = ..., realism_threshold: _Optional[float] = ...) -> None: ...

class Lesion(_message.Message):
    __slots__ = ("instance", "organ", "centre", "size", "contrast", "diameter_mm", "radii_mm", "requested_hu", "realised_hu", "gate", "discriminator")
    INSTANCE_FIELD_NUMBER: _ClassVar[int]
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    CENTRE_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    CONTRAST_FIELD_NUMBER: _ClassVar[int]
    DIAMETER_MM_FIELD_NUMBER: _ClassVar[int]
    RADII_MM_FIELD_NUMBER: _ClassVar[int]
    REQUESTED_HU_FIELD_NUMBER: _ClassVar[int]
    REALISED_HU_FIELD_NUMBER: _ClassVar[int]
    GATE_FIELD_NUMBER: _ClassVar[int]
    DISCRIMINATOR_FIELD_NUMBER: _ClassVar[int]
    instance: int
    organ: str
    centre: _containers.RepeatedScalarFieldContainer[int]
    size: SizeClass
    contrast: ContrastBin
    diameter_mm: float
    radii_mm: _containers.RepeatedScalarFieldContainer[float]
    requested_hu: float
    realised_hu: float
    gate: GateScores
    discriminator: float
    def __init__(self, instance: _Optional[int] = ..., organ: _Optional[str] = ..., centre: _Optional[_Iterable[int]] = ..., size: _Optional[_Union[SizeClass, str]] = ..., contrast: _Optional[_Union[ContrastBin, str]] = ..., diameter_mm: _Optional[float] = ..., radii_mm: _Optional[_Iterable[float]] = ..., requested_hu: _Optional[float] = ..., realised_hu: _Optional[float] = ..., gate: _Optional[_Union[GateScores, _Mapping]] = ..., discriminator: _Optional[float] = ...) -> None: ...

class Region(_message.Message):
    __slots__ = ("start", "size")
    START_FIELD_NUMBER: _ClassVar[int]
    SIZE_FIELD_NUMBER: _ClassVar[int]
    start: _containers.RepeatedScalarFieldContainer[int]
    size: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, start: _Optional[_Iterable[int]] = ..., size: _Optional[_Iterable[int]] = ...) -> None: ...

class PatchMeta(_message.Message):
    __slots__ = ("index", "case_id", "pool", "organ", "region", "affine", "outcome", "attempts", "host_suspect", "borderline", "lesions", "failed", "ignored_voxels", "labels_by")
    INDEX_FIELD_NUMBER: _ClassVar[int]
    CASE_ID_FIELD_NUMBER: _ClassVar[int]
    POOL_FIELD_NUMBER: _ClassVar[int]
    ORGAN_FIELD_NUMBER: _ClassVar[int]
    REGION_FIELD_NUMBER: _ClassVar[int]
    AFFINE_FIELD_NUMBER: _ClassVar[int]
    OUTCOME_FIELD_NUMBER: _ClassVar[int]
    ATTEMPTS_FIELD_NUMBER: _ClassVar[int]
    HOST_SUSPECT_FIELD_NUMBER: _ClassVar[int]
    BORDERLINE_FIELD_NUMBER: _ClassVar[int]
    LESIONS_FIELD_NUMBER: _ClassVar[int]
    FAILED_FIELD_NUMBER: _ClassVar[int]
    IGNORED_VOXELS_FIELD_NUMBER: _ClassVar[int]
    LABELS_BY_FIELD_NUMBER: _ClassVar[int]
    index: int
    case_id: str
    pool: Pool
    organ: str
    region: Region
    affine: _containers.RepeatedScalarFieldContainer[float]
    outcome: Outcome
    attempts: int
    host_suspect: int
    borderline: bool
    lesions: _containers.RepeatedCompositeFieldContainer[Lesion]
    failed: str
    ignored_voxels: int
    labels_by: str
    def __init__(self, index: _Optional[int] = ..., case_id: _Optional[str] = ..., pool: _Optional[_Union[Pool, str]] = ..., organ: _Optional[str] = ..., region: _Optional[_Union[Region, _Mapping]] = ..., affine: _Optional[_Iterable[float]] = ..., outcome: _Optional[_Union[Outcome, str]] = ..., attempts: _Optional[int] = ..., host_suspect: _Optional[int] = ..., borderline: bool = ..., lesions: _Optional[_Iterable[_Union[Lesion, _Mapping]]] = ..., failed: _Optional[str] = ..., ignored_voxels: _Optional[int] = ..., labels_by: _Optional[str] = ...) -> None: ...

class BatchHeader(_message.Message):
    __slots__ = ("step", "tensors", "patches", "next", "reused")
    STEP_FIELD_NUMBER: _ClassVar[int]
    TENSORS_FIELD_NUMBER: _ClassVar[int]
    PATCHES_FIELD_NUMBER: _ClassVar[int]
    NEXT_FIELD_NUMBER: _ClassVar[int]
    REUSED_FIELD_NUMBER: _ClassVar[int]
    step: int
    tensors: _containers.RepeatedCompositeFieldContainer[Tensor]
    patches: _containers.RepeatedCompositeFieldContainer[PatchMeta]
    next: Cursor
    reused: _containers.RepeatedScalarFieldContainer[int]
    def __init__(self, step: _Optional[int] = ..., tensors: _Optional[_Iterable[_Union[Tensor, _Mapping]]] = ..., patches: _Optional[_Iterable[_Union[PatchMeta, _Mapping]]] = ..., next: _Optional[_Union[Cursor, _Mapping]] = ..., reused: _Optional[_Iterable[int]] = ...) -> None: ...

class Heartbeat(_message.Message):
    __slots__ = ("waiting_seconds",)
    WAITING_SECONDS_FIELD_NUMBER: _ClassVar[int]
    waiting_seconds: int
    def __init__(self, waiting_seconds: _Optional[int] = ...) -> None: ...

class End(_message.Message):
    __slots__ = ("reason", "cursor")
    REASON_FIELD_NUMBER: _ClassVar[int]
    CURSOR_FIELD_NUMBER: _ClassVar[int]
    reason: EndReason
    cursor: Cursor
    def __init__(self, reason: _Optional[_Union[EndReason, str]] = ..., cursor: _Optional[_Union[Cursor, _Mapping]] = ...) -> None: ...

class Error(_message.Message):
    __slots__ = ("type", "title", "status", "detail", "field", "request_id")
    TYPE_FIELD_NUMBER: _ClassVar[int]
    TITLE_FIELD_NUMBER: _ClassVar[int]
    STATUS_FIELD_NUMBER: _ClassVar[int]
    DETAIL_FIELD_NUMBER: _ClassVar[int]
    FIELD_FIELD_NUMBER: _ClassVar[int]
    REQUEST_ID_FIELD_NUMBER: _ClassVar[int]
    type: str
    title: str
    status: int
    detail: str
    field: str
    request_id: str
    def __init__(self, type: _Optional[str] = ..., title: _Optional[str] = ..., status: _Optional[int] = ..., detail: _Optional[str] = ..., field: _Optional[str] = ..., request_id: _Optional[str] = ...) -> None: ...
