// What `serve` remembers over restarts: one row a validation, and which watched iterations are done.
#pragma once

#include <cstdint>
#include <filesystem>
#include <memory>
#include <mutex>
#include <optional>
#include <string>
#include <vector>

namespace cli {

/// How a validation ended. Running rows of a server that died become Interrupted when the next one opens the history.
enum class State { Running, Sound, Bad, Failed, Interrupted };
const char* name(State state);

struct Record {
  std::int64_t id = 0;
  std::string checkpoint, origin;  ///< as shown to people; "request" or "watch"
  State state = State::Running;
  int status = 0;                  ///< exit status that `shardkit validate` would have had
  double started = 0, seconds = 0; ///< since 1970; of work
  std::optional<double> loss;      ///< over the true vocabulary
  std::string error, answer;       ///< one line where there is no answer; the JSON object of `validate --json`
};

/// A watched folder in the state that `stamp` stands for.
struct Watched {
  std::string path, stamp;
};

/// An SQLite file that one server at a time holds. Safe to call from any thread; throws Io where the disk does not take a row.
class History {
 public:
  /// Makes the file and its folder where they are missing and keeps the newest `keep` rows. Throws Usage where another server
  /// holds it, BadFormat where it is no history or one of a newer shardkit.
  History(const std::filesystem::path& file, std::int64_t keep);
  ~History();

  /// A row, and one more attempt at what is watched: both or neither. Sets the record's id and start.
  void begin(Record& record, const std::optional<Watched>& watched = std::nullopt);
  /// Fills the row of `record.id`; an interrupted attempt does not count. What the disk does not take now is kept and written
  /// before the next row.
  void finish(const Record& record, const std::optional<Watched>& watched = std::nullopt);
  /// For a shutdown that cannot wait for the worker.
  void interrupt_running();

  /// Newest first; answers only where asked for.
  std::vector<Record> latest(std::int64_t most, bool answers) const;
  std::optional<Record> find(std::int64_t id) const;

  /// Done, or begun three times without an end.
  bool is_done(const Watched& watched) const;

 private:
  struct Database;
  struct Ending {
    Record record;
    std::optional<Watched> watched;
  };
  void write(const Ending& ending);
  void write_late();
  std::unique_ptr<Database> database_;
  mutable std::mutex mutex_;
  std::vector<Ending> late_;
  std::int64_t keep_;
};

}  // namespace cli
