// What naming a module's attribute in a pickle means: a known value, an opaque record, or the end. Decided by
// name alone, before anything is built; refuses what is not in the tables and no class of a third party.
#include <algorithm>
#include <cctype>
#include <iterator>

#include "formats/pickle.h"

namespace formats::pickle {
namespace {

struct Rule {
  std::string_view module;
  std::string_view names;  // between spaces; "*" for all
  Verdict verdict;
};
constexpr auto kBuild = Verdict::Build;
constexpr auto kRecord = Verdict::Record;

constexpr Rule kRules[] = {
    {"_codecs", " encode ", kBuild},
    {"_io", " BytesIO ", kBuild},
    {"argparse", " Namespace ", kBuild},
    // `object` is what copyreg._reconstructor takes as the base.
    {"builtins",
     " bool bytearray bytes complex dict float frozenset int list object range set slice str tuple ", kBuild},
    {"collections", " Counter OrderedDict defaultdict deque ", kBuild},
    {"copyreg", " _reconstructor ", kBuild},
    {"datetime", "*", kRecord},
    {"functools", " partial ", kRecord},
    {"io", " BytesIO ", kBuild},
    {"numpy", " dtype ndarray ", kBuild},
    {"numpy._core.multiarray", " _reconstruct scalar ", kBuild},
    {"numpy._core.numeric", " _frombuffer ", kRecord},  // arrays of protocol 5
    {"numpy.core.multiarray", " _reconstruct scalar ", kBuild},
    {"numpy.core.numeric", " _frombuffer ", kRecord},
    {"numpy.dtypes", "*", kBuild},
    {"pathlib", " Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath ", kRecord},
    {"pathlib._local", " Path PosixPath PurePath PurePosixPath PureWindowsPath WindowsPath ",
     kRecord},  // Python 3.13
    {"signal", " Signals ", kRecord},
    {"torch", " Size Tensor device ", kBuild},
    {"torch._C", " Generator ", kRecord},
    {"torch._tensor", " _rebuild_from_type_v2 ", kBuild},
    {"torch._utils",
     " _rebuild_tensor _rebuild_tensor_v2 _rebuild_tensor_v3 _rebuild_parameter "
     "_rebuild_parameter_with_state ",
     kBuild},
    // Errors only where one of them is needed as a tensor.
    {"torch._utils",
     " _rebuild_device_tensor_from_cpu_tensor _rebuild_device_tensor_from_numpy "
     "_rebuild_meta_tensor_no_storage _rebuild_nested_tensor _rebuild_qtensor _rebuild_sparse_csr_tensor "
     "_rebuild_sparse_tensor _rebuild_wrapper_subclass ",
     kRecord},
    {"torch.distributed._shard.sharded_tensor.metadata", " MEM_FORMAT_ENCODING TensorProperties ", kBuild},
    {"torch.distributed.checkpoint.filesystem", " _StorageInfo ", kBuild},
    {"torch.distributed.checkpoint.metadata", "*", kBuild},
    {"torch.distributed.checkpoint.planner", "*", kBuild},
    {"torch.nn.parameter", " Buffer Parameter ", kBuild},
    {"torch.serialization", " _get_layout ", kBuild},
    {"torch.storage", " TypedStorage UntypedStorage _TypedStorage _UntypedStorage ", kBuild},
    {"types", " SimpleNamespace ", kBuild},
    {"uuid", " UUID ", kRecord},
};

constexpr std::string_view kStorages =
    " BFloat16Storage BoolStorage ByteStorage CharStorage ComplexDoubleStorage ComplexFloatStorage "
    "DoubleStorage "
    "FloatStorage HalfStorage IntStorage LongStorage QInt32Storage QInt8Storage QUInt2x4Storage "
    "QUInt4x2Storage "
    "QUInt8Storage ShortStorage UntypedStorage ";

constexpr std::string_view kTorchValues =
    " float64 float32 float16 bfloat16 float8_e4m3fn float8_e5m2 float8_e4m3fnuz float8_e5m2fnuz "
    "float8_e8m0fnu "
    "float4_e2m1fn_x2 complex32 complex64 complex128 int64 int32 int16 int8 uint64 uint32 uint16 uint8 bool "
    "int1 int2 int3 int4 int5 int6 int7 uint1 uint2 uint3 uint4 uint5 uint6 uint7 "
    "bits1x8 bits2x4 bits4x2 bits8 bits16 qint8 quint8 qint32 quint4x2 quint2x4 "
    "strided contiguous_format preserve_format channels_last channels_last_3d ";

// Top-level modules of Python 3.8 to 3.14 and of Python 2: outside the rules above they mean code.
constexpr std::string_view kStandardLibrary =
    " "
    "BaseHTTPServer Bastion CGIHTTPServer ConfigParser Cookie DocXMLRPCServer HTMLParser MimeWriter Queue "
    "SimpleHTTPServer SimpleXMLRPCServer SocketServer StringIO Tkinter UserDict UserList UserString "
    "__builtin__ __future__ __main__ _abc _aix_support _android_support _apple_support _ast _asyncio "
    "_bisect _blake2 _bootlocale _bootsubprocess _bz2 _codecs _codecs_cn _codecs_hk _codecs_iso2022 "
    "_codecs_jp _codecs_kr _codecs_tw _collections _collections_abc _colorize _compat_pickle _compression "
    "_contextvars _crypt _csv _ctypes _curses _curses_panel _datetime _dbm _decimal _elementtree "
    "_frozen_importlib _frozen_importlib_external _functools _gdbm _hashlib _heapq _hmac _imp "
    "_interpchannels _interpqueues _interpreters _io _ios_support _json _locale _lsprof _lzma _markupbase "
    "_md5 _msi _multibytecodec _multiprocessing _opcode _opcode_metadata _operator _osx_support "
    "_overlapped _pickle _posixshmem _posixsubprocess _py_abc _py_warnings _pydecimal _pyio _pyrepl "
    "_queue _random _remote_debugging _scproxy _sha1 _sha256 _sha3 _sha512 _signal _sitebuiltins _socket "
    "_sqlite3 _sre _ssl _stat _statistics _string _strptime _struct _suggestions _symtable _sysconfig "
    "_thread _threading_local _tkinter _tokenize _tracemalloc _types _typing _uuid _warnings _weakref "
    "_weakrefset _winapi _winreg _zoneinfo _zstd abc aifc annotationlib antigravity anydbm argparse array "
    "ast asynchat asyncio asyncore atexit audioop base64 bdb binascii binhex bisect bsddb builtins bz2 "
    "cPickle cProfile cStringIO calendar cgi cgitb chunk cmath cmd code codecs codeop collections "
    "colorsys commands compileall compiler compression concurrent configparser contextlib contextvars "
    "cookielib copy copy_reg copyreg crypt csv ctypes curses dataclasses datetime dbhash dbm decimal "
    "difflib dircache dis distutils dl doctest dumbdbm dummy_thread dummy_threading email encodings "
    "ensurepip enum errno exceptions faulthandler fcntl filecmp fileinput fnmatch formatter fpformat "
    "fractions ftplib functools future_builtins gc gdbm genericpath getopt getpass gettext glob graphlib "
    "grp gzip hashlib heapq hmac hotshot html htmlentitydefs htmllib http httplib idlelib ihooks imaplib "
    "imghdr imp importlib imputil inspect io ipaddress itertools json keyword lib2to3 linecache locale "
    "logging lzma macpath mailbox mailcap markupbase marshal math md5 mhlib mimetools mimetypes mimify "
    "mmap modulefinder msilib msvcrt multifile multiprocessing mutex netrc new nis nntplib nt ntpath "
    "nturl2path numbers opcode operator optparse os os2 os2emxpath ossaudiodev parser pathlib pdb pickle "
    "pickletools pipes pkgutil platform plistlib popen2 poplib posix posixfile posixpath pprint profile "
    "pstats pty pwd py_compile pyclbr pydoc pydoc_data pyexpat queue quopri random re readline repr "
    "reprlib resource rexec rfc822 rlcompleter robotparser runpy sched secrets select selectors sets "
    "sgmllib sha shelve shlex shutil signal site smtpd smtplib sndhdr socket socketserver spwd sqlite3 "
    "sre sre_compile sre_constants sre_parse ssl stat statistics statvfs string stringold stringprep "
    "strop struct subprocess sunau sv symbol symtable sys sysconfig syslog tabnanny tarfile telnetlib "
    "tempfile termios textwrap this thread threading time timeit tkFileDialog tkMessageBox tkSimpleDialog "
    "tkinter toaiff token tokenize tomllib trace traceback tracemalloc tty turtle turtledemo types typing "
    "unicodedata unittest urllib urllib2 urlparse user uu uuid venv warnings wave weakref webbrowser "
    "whichdb winreg winsound wsgiref xdrlib xml xmlrpc xmlrpclib zipapp zipfile zipimport zlib zoneinfo ";

bool among(std::string_view word, std::string_view words) {
  if (word.empty() || word.find(' ') != word.npos) return false;
  for (auto at = words.find(word); at != words.npos; at = words.find(word, at + 1)) {
    if (words[at - 1] == ' ' && words[at + word.size()] == ' ') return true;
  }
  return false;
}

bool names_value(std::string_view module, std::string_view name) {
  if (module == "torch") return among(name, kStorages) || among(name, kTorchValues);
  return module == "torch.cuda" && among(name, kStorages);
}

bool is_identifier(std::string_view word) {
  return !word.empty() && std::all_of(word.begin(), word.end(), [](unsigned char c) {
    return std::isalnum(c) || c == '_' || c >= 0x80;
  });
}

}  // namespace

Verdict verdict(std::string_view module, std::string_view name) {
  if (!is_identifier(name)) return Verdict::Refuse;
  if (module == "__builtin__") module = "builtins";
  const auto rule = std::find_if(std::begin(kRules), std::end(kRules), [&](const Rule& row) {
    return row.module == module && (row.names == "*" || among(name, row.names));
  });
  if (rule != std::end(kRules)) return rule->verdict;
  if (names_value(module, name)) return Verdict::Build;
  if (module.starts_with("torch.distributed.")) return Verdict::Record;
  const auto package = module.substr(0, module.find('.'));
  const bool third_party =
      is_identifier(package) && package != "torch" && package != "numpy" && !among(package, kStandardLibrary);
  return third_party ? Verdict::Record : Verdict::Refuse;
}

}  // namespace formats::pickle
