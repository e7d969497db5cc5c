// SQLite in WAL mode: a row is begun before the work, so that a kill at any moment leaves a row that says so.
#include "cli/serve/history.h"

#include "libshard/error.h"

#include <sqlite3.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <type_traits>

#include <fcntl.h>
#include <sys/file.h>
#include <unistd.h>

namespace cli {
namespace {

using shard::Code;

constexpr int kSchema = 1;
constexpr const char* kCreate = R"(
  CREATE TABLE validations(
    id INTEGER PRIMARY KEY AUTOINCREMENT, checkpoint TEXT NOT NULL, origin TEXT NOT NULL, state INTEGER NOT NULL, status INTEGER NOT NULL,
    started REAL NOT NULL, seconds REAL NOT NULL, loss REAL, error TEXT NOT NULL, answer TEXT NOT NULL);
  CREATE TABLE watched(path TEXT PRIMARY KEY, stamp TEXT NOT NULL, attempts INTEGER NOT NULL, done INTEGER NOT NULL);
  PRAGMA user_version = 1;
)";
constexpr const char* kColumns = "id, checkpoint, origin, state, status, started, seconds, loss, error";

}  // namespace

const char* name(State state) {
  static constexpr const char* kNames[] = {"running", "sound", "bad", "error", "interrupted"};
  return kNames[static_cast<int>(state)];
}

/// The connection, and one function to run a statement with values bound in their order.
struct History::Database {
  explicit Database(const std::filesystem::path& file) : file(file.string()), where(file.string()) {}
  ~Database() {
    sqlite3_close(handle);
    if (lock >= 0) ::close(lock);
  }

  [[noreturn]] void fail(Code code) const { shard::fail(code, "{}: {}", where, handle ? sqlite3_errmsg(handle) : "cannot be opened"); }

  void execute(const char* text) const {
    if (sqlite3_exec(handle, text, nullptr, nullptr, nullptr) != SQLITE_OK) fail(Code::Io);
  }

  struct Statement {
    sqlite3_stmt* handle = nullptr;
    ~Statement() { sqlite3_finalize(handle); }
    std::string text(int column) const {
      const auto* at = reinterpret_cast<const char*>(sqlite3_column_text(handle, column));
      return at ? std::string(at, static_cast<std::size_t>(sqlite3_column_bytes(handle, column))) : std::string();
    }
  };

  template <typename Row, typename... Values>
  void query(const std::string& text, Row&& row, const Values&... values) const {
    Statement statement;
    if (const int prepared = sqlite3_prepare_v2(handle, text.c_str(), -1, &statement.handle, nullptr); prepared != SQLITE_OK)
      fail(prepared == SQLITE_ERROR || prepared == SQLITE_CORRUPT || prepared == SQLITE_NOTADB ? Code::BadFormat : Code::Io);  // other tables, or damage
    int at = 0;
    (bind(statement, ++at, values), ...);
    int result;
    while ((result = sqlite3_step(statement.handle)) == SQLITE_ROW) row(statement);
    if (result != SQLITE_DONE) fail(Code::Io);
  }
  template <typename... Values>
  void change(const std::string& text, const Values&... values) const {
    query(text, [](const Statement&) {}, values...);
  }

  /// All that `changes` does, or nothing of it.
  template <typename Changes>
  void together(Changes&& changes) const {
    execute("BEGIN IMMEDIATE");
    try {
      changes();
      execute("COMMIT");
    } catch (...) {
      sqlite3_exec(handle, "ROLLBACK", nullptr, nullptr, nullptr);  // a failed one may have rolled back already
      throw;
    }
  }

  template <typename Value>
  void bind(const Statement& s, int at, const Value& value) const {
    int result;
    if constexpr (std::is_same_v<Value, std::string>) result = sqlite3_bind_text(s.handle, at, value.data(), static_cast<int>(value.size()), SQLITE_TRANSIENT);
    else if constexpr (std::is_same_v<Value, std::optional<double>>) result = value && std::isfinite(*value) ? sqlite3_bind_double(s.handle, at, *value) : sqlite3_bind_null(s.handle, at);
    else if constexpr (std::is_floating_point_v<Value>) result = sqlite3_bind_double(s.handle, at, value);
    else result = sqlite3_bind_int64(s.handle, at, static_cast<sqlite3_int64>(value));
    if (result != SQLITE_OK) fail(Code::Io);
  }

  static Record record(const Statement& s) {
    Record r;
    r.id = sqlite3_column_int64(s.handle, 0);
    r.checkpoint = s.text(1);
    r.origin = s.text(2);
    r.state = static_cast<State>(std::min(4, std::max(0, sqlite3_column_int(s.handle, 3))));
    r.status = sqlite3_column_int(s.handle, 4);
    r.started = sqlite3_column_double(s.handle, 5);
    r.seconds = sqlite3_column_double(s.handle, 6);
    if (sqlite3_column_type(s.handle, 7) != SQLITE_NULL) r.loss = sqlite3_column_double(s.handle, 7);
    r.error = s.text(8);
    if (sqlite3_column_count(s.handle) > 9) r.answer = s.text(9);
    return r;
  }

  std::string file, where;  ///< as messages call it
  sqlite3* handle = nullptr;
  int lock = -1;
};

History::History(const std::filesystem::path& file, std::int64_t keep) : database_(std::make_unique<Database>(file)), keep_(keep) {
  auto& db = *database_;
  std::error_code error;
  if (file.has_parent_path()) std::filesystem::create_directories(file.parent_path(), error);
  // Two servers would take each other's running rows for those of a dead one.
  db.lock = ::open((file.string() + ".lock").c_str(), O_RDWR | O_CREAT | O_CLOEXEC, 0600);
  shard::require(db.lock >= 0, Code::Io, [&] { return fmt::format("{}.lock: cannot be made", db.file); });
  shard::require(::flock(db.lock, LOCK_EX | LOCK_NB) == 0, Code::Usage, [&] { return fmt::format("--history {}: another server holds it; give each its own", db.file); });
  if (sqlite3_open_v2(db.file.c_str(), &db.handle, SQLITE_OPEN_READWRITE | SQLITE_OPEN_CREATE | SQLITE_OPEN_FULLMUTEX, nullptr) != SQLITE_OK) db.fail(Code::Io);
  sqlite3_busy_timeout(db.handle, 5000);
  if (sqlite3_exec(db.handle, "PRAGMA journal_mode = WAL; PRAGMA synchronous = FULL;", nullptr, nullptr, nullptr) != SQLITE_OK)
    db.fail(sqlite3_errcode(db.handle) == SQLITE_NOTADB ? Code::BadFormat : Code::Io);
  std::int64_t version = 0, tables = 0;
  db.query("PRAGMA user_version", [&](const auto& s) { version = sqlite3_column_int64(s.handle, 0); });
  db.query("SELECT count(*) FROM sqlite_master", [&](const auto& s) { tables = sqlite3_column_int64(s.handle, 0); });
  shard::require(version == kSchema || (version == 0 && tables == 0), Code::BadFormat, [&] { return fmt::format("{}: is no history of this shardkit (schema {}); should be schema {}", db.file, version, kSchema); });
  if (version == 0) db.together([&] { db.execute(kCreate); });
  for (const auto& probe : {fmt::format("SELECT {}, answer FROM validations LIMIT 0", kColumns), std::string("SELECT path, stamp, attempts, done FROM watched LIMIT 0")}) db.change(probe);
  interrupt_running();
  db.where = "history";  // from here on clients read the messages
}

History::~History() {
  try {
    write_late();
  } catch (const std::exception&) {  // stays a running row, which the next server calls interrupted
  }
}

void History::begin(Record& record, const std::optional<Watched>& watched) {
  const std::lock_guard lock(mutex_);
  write_late();
  record.started = std::chrono::duration<double>(std::chrono::system_clock::now().time_since_epoch()).count();
  std::int64_t id = 0;
  database_->together([&] {
    database_->change("INSERT INTO validations(checkpoint, origin, state, status, started, seconds, loss, error, answer) VALUES(?, ?, 0, 0, ?, 0, NULL, '', '')", record.checkpoint, record.origin, record.started);
    id = sqlite3_last_insert_rowid(database_->handle);
    database_->change("DELETE FROM validations WHERE id <= ?", id - keep_);
    if (watched)
      database_->change("INSERT INTO watched VALUES(?1, ?2, 1, 0) ON CONFLICT(path) DO UPDATE SET attempts = CASE WHEN stamp = ?2 THEN attempts + 1 ELSE 1 END, stamp = ?2, done = 0",
                        watched->path, watched->stamp);
  });
  record.id = id;
}

void History::finish(const Record& record, const std::optional<Watched>& watched) {
  const std::lock_guard lock(mutex_);
  late_.push_back({record, watched});
  write_late();
}

/// Of a full disk there is never more than one: the next row cannot begin before.
void History::write_late() {
  while (!late_.empty()) {
    write(late_.front());
    late_.erase(late_.begin());
  }
}

void History::write(const Ending& ending) {
  const auto& r = ending.record;
  database_->together([&] {
    database_->change("UPDATE validations SET state = ?, status = ?, seconds = ?, loss = ?, error = ?, answer = ? WHERE id = ?", static_cast<int>(r.state), r.status, r.seconds, r.loss, r.error,
                      r.answer, r.id);
    if (!ending.watched) return;
    const auto* change = r.state == State::Interrupted ? "UPDATE watched SET attempts = attempts - 1 WHERE path = ? AND stamp = ?" : "UPDATE watched SET done = 1 WHERE path = ? AND stamp = ?";
    database_->change(change, ending.watched->path, ending.watched->stamp);
  });
}

void History::interrupt_running() {
  const std::lock_guard lock(mutex_);
  database_->change("UPDATE validations SET state = 4, status = 7, error = 'the server stopped before the end' WHERE state = 0");
}

std::vector<Record> History::latest(std::int64_t most, bool answers) const {
  const std::lock_guard lock(mutex_);
  std::vector<Record> out;
  database_->query(fmt::format("SELECT {}{} FROM validations ORDER BY id DESC LIMIT ?", kColumns, answers ? ", answer" : ""),
                   [&](const auto& s) { out.push_back(Database::record(s)); }, most);
  return out;
}

std::optional<Record> History::find(std::int64_t id) const {
  const std::lock_guard lock(mutex_);
  std::optional<Record> out;
  database_->query(fmt::format("SELECT {}, answer FROM validations WHERE id = ?", kColumns), [&](const auto& s) { out = Database::record(s); }, id);
  return out;
}

bool History::is_done(const Watched& watched) const {
  const std::lock_guard lock(mutex_);
  bool out = std::any_of(late_.begin(), late_.end(), [&](const Ending& e) {
    return e.watched && e.record.state != State::Interrupted && e.watched->path == watched.path && e.watched->stamp == watched.stamp;
  });
  // A checkpoint that takes the whole process down must not do so for ever.
  database_->query("SELECT 1 FROM watched WHERE path = ? AND stamp = ? AND (done OR attempts >= 3)", [&](const auto&) { out = true; }, watched.path, watched.stamp);
  return out;
}

}  // namespace cli
