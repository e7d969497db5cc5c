// Which names a pickle may hold. Decided by name alone, before anything is built.
#include <algorithm>
#include <array>

#include "formats/pickle.h"

namespace formats::pickle {
namespace {

struct Allowed {
  std::string_view module, names;  ///< names between spaces; "*" for all
};

constexpr Allowed kBuild[] = {
    {"torch._utils",
     " _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter "
     "_rebuild_parameter_with_state "},
    {"torch._tensor", " _rebuild_from_type_v2 "},
    {"torch.storage", " UntypedStorage TypedStorage _UntypedStorage _TypedStorage "},
    {"torch", " Size device Tensor "},
    {"torch.serialization", " _get_layout "},
    {"torch.nn.parameter", " Parameter Buffer "},
    {"collections", " OrderedDict defaultdict Counter deque "},
    {"builtins",
     " set frozenset dict list tuple bytes bytearray complex slice range int float str bool object "},
    {"__builtin__",
     " set frozenset dict list tuple bytes bytearray complex slice xrange range int long float str unicode "
     "bool object "},
    {"argparse", " Namespace "},
    {"types", " SimpleNamespace "},
    {"_codecs", " encode "},
    {"_io", " BytesIO "},
    {"io", " BytesIO "},
    {"copyreg", " _reconstructor "},
    {"copy_reg", " _reconstructor "},
    {"pathlib", " PosixPath Path PurePosixPath WindowsPath PureWindowsPath PurePath "},
    {"pathlib._local", " PosixPath Path PurePosixPath WindowsPath PureWindowsPath PurePath "},
    {"datetime", " datetime date time timedelta timezone "},
    {"functools", " partial "},
    {"uuid", " UUID "},
    {"signal", " Signals "},
    {"numpy.core.multiarray", " _reconstruct scalar "},
    {"numpy._core.multiarray", " _reconstruct scalar "},
    {"numpy", " ndarray dtype "},
    {"torch.distributed.checkpoint.metadata", " * "},
    {"torch.distributed._shard.sharded_tensor.metadata", " TensorProperties MEM_FORMAT_ENCODING "},
    {"torch.distributed.checkpoint.filesystem", " _StorageInfo "},
    {"torch.distributed.checkpoint.planner",
     " SavePlan WriteItem WriteItemType TensorWriteData BytesIOWriteData "},
};

/// Kept as they are; an error only where one of them is needed as a tensor.
constexpr Allowed kRecord[] = {
    {"torch._utils",
     " _rebuild_sparse_tensor _rebuild_sparse_csr_tensor _rebuild_qtensor _rebuild_nested_tensor "
     "_rebuild_meta_tensor_no_storage _rebuild_wrapper_subclass _rebuild_device_tensor_from_numpy "
     "_rebuild_device_tensor_from_cpu_tensor "},
    {"torch._C", " Generator "},
};

constexpr std::string_view kTorchTypes =
    " float32 float64 float16 bfloat16 float half double long int short int8 int16 int32 int64 uint8 uint16 "
    "uint32 uint64 bool complex32 complex64 complex128 "
    "cfloat cdouble float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz float8_e8m0fnu "
    "float4_e2m1fn_x2 "
    "qint8 quint8 qint32 quint4x2 quint2x4 bits1x8 bits2x4 bits4x2 bits8 bits16 strided contiguous_format "
    "preserve_format ";

constexpr std::string_view kStandardLibrary =
    " __future__ __main__ __builtin__ _abc _ast _asyncio _bisect _codecs _collections _csv _ctypes _datetime "
    "_elementtree _functools _heapq _imp _io _json _lsprof "
    "_operator _osx_support _pickle _posixsubprocess _py_abc _pydecimal _pyio _random _signal _socket "
    "_sqlite3 _sre _ssl _stat _string _struct _symtable _sysconfigdata "
    "_thread _threading_local _tkinter _tracemalloc _warnings _weakref _weakrefset _winapi abc aifc anydbm "
    "argparse array ast asynchat asyncio asyncore atexit audioop base64 "
    "bdb binascii bisect builtins bz2 cPickle cProfile cStringIO calendar cgi cgitb chunk cmath cmd code "
    "codecs codeop collections colorsys commands compileall concurrent "
    "configparser contextlib contextvars copy copy_reg copyreg crypt csv ctypes curses dataclasses datetime "
    "dbm decimal difflib dircache dis distutils doctest email encodings "
    "ensurepip enum errno exceptions faulthandler fcntl filecmp fileinput fnmatch formatter fractions ftplib "
    "functools gc genericpath getopt getpass gettext glob graphlib grp "
    "gzip hashlib heapq hmac html http httplib idlelib imaplib imghdr imp importlib inspect io ipaddress "
    "itertools json keyword lib2to3 linecache locale logging lzma mailbox "
    "mailcap marshal math mimetypes mmap modulefinder msilib msvcrt multiprocessing netrc new nis nntplib nt "
    "ntpath nturl2path numbers opcode operator optparse os ossaudiodev "
    "parser pathlib pdb pickle pickletools pipes pkgutil platform plistlib popen2 poplib posix posixfile "
    "posixpath pprint profile pstats pty pwd py_compile pyclbr pydoc "
    "pydoc_data pyexpat queue quopri random re readline reprlib resource rlcompleter runpy sched secrets "
    "select selectors shelve shlex shutil signal site smtpd smtplib sndhdr "
    "socket socketserver spwd sqlite3 sre_compile sre_constants sre_parse ssl stat statistics string "
    "stringprep struct subprocess sunau symbol symtable sys sysconfig syslog "
    "tabnanny tarfile telnetlib tempfile termios test textwrap this thread threading time timeit tkinter "
    "token tokenize tomllib trace traceback tracemalloc tty turtle types "
    "typing unicodedata unittest urllib urllib2 urlparse uu uuid venv warnings wave weakref webbrowser "
    "winreg winsound wsgiref xdrlib xml xmlrpc xmlrpclib zipapp zipfile "
    "zipimport zlib zoneinfo nt ";

bool among(std::string_view word, std::string_view words) {
  if (word.empty() || word.find(' ') != word.npos) return false;
  for (auto at = words.find(word); at != words.npos; at = words.find(word, at + 1))
    if (at > 0 && words[at - 1] == ' ' && words[at + word.size()] == ' ') return true;
  return false;
}

template <std::size_t N>
bool listed(const Allowed (&table)[N], std::string_view module, std::string_view name) {
  return std::any_of(std::begin(table), std::end(table), [&](const Allowed& row) {
    return row.module == module && (row.names == " * " || among(name, row.names));
  });
}

bool torch_value(std::string_view module, std::string_view name) {
  if (module == "torch" && (among(name, kTorchTypes) || name.ends_with("Storage"))) return true;
  return module == "torch.cuda" && name.ends_with("Storage");
}

}  // namespace

Verdict verdict(std::string_view module, std::string_view name) {
  if (name.empty() || module.empty() || name.find('.') != name.npos) return Verdict::Refuse;
  if (listed(kBuild, module, name) || torch_value(module, name)) return Verdict::Build;
  if (listed(kRecord, module, name)) return Verdict::Record;
  const auto first = module.substr(0, module.find('.'));
  if (first == "torch")
    return module.starts_with("torch.distributed.") || module == "torch.distributed" ? Verdict::Record
                                                                                     : Verdict::Refuse;
  if (first == "numpy") return module == "numpy.dtypes" ? Verdict::Record : Verdict::Refuse;
  if (among(first, kStandardLibrary)) return Verdict::Refuse;
  for (const char c : first)
    if (!std::isalnum(static_cast<unsigned char>(c)) && c != '_') return Verdict::Refuse;
  return Verdict::Record;
}

}  // namespace formats::pickle
