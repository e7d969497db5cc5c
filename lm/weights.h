// Weights as they are needed: read ahead in the order of use, within a memory limit, each looked at once for what is wrong.
#pragma once

#include "libshard/execute.h"
#include "libshard/range_reader.h"
#include "lm/look.h"
#include "lm/mapped_file.h"
#include "lm/scaled_blocks.h"
#include "lm/tensor.h"

#include <condition_variable>
#include <deque>
#include <exception>
#include <map>
#include <mutex>
#include <optional>
#include <string>
#include <string_view>
#include <thread>
#include <vector>

namespace lm {

/// Rows [lo, lo + count) of a tensor (count −1: all of it), and how often they are taken before they are let go. Never taken:
/// only looked at.
struct WeightUse {
  std::string name;
  Index lo = 0, count = -1;
  int times = 1;
};

/// What a weight's numbers look like.
struct WeightStats {
  std::string name;
  std::uint64_t elements = 0;
  double rms = 0, max_abs = 0;
  bool matrix = false;
};

/// Weights whose root mean square is ten times that of the same weight in the median layer, or a tenth of it, as warnings.
/// Only matrices that at least four layers have.
std::vector<shard::Finding> norm_outliers(const std::vector<WeightStats>& weights);

/// How products see a weight: a vector is one row, what has more dimensions has its last ones in a row.
struct Sides {
  Index rows, columns;
};

/// Weights of one checkpoint, in types that products take.
class WeightSource {
 public:
  /// Keeps a reference to `from`. `exact`: names that keep their type in Bf16 (a router's selection bias).
  WeightSource(const shard::Reader& from, const shard::Kernels& kernels, Compute compute);

  /// Tensors, and in Fp8 the scales of those that products take so.
  bool has(const std::string& name) const;
  /// Natural shape. Throws Mismatch where there is no such tensor.
  const shard::Shape& shape(const std::string& name) const;
  Sides sides(const std::string& name) const;
  shard::DType dtype(const std::string& name) const;
  /// What read() gives it as: in Fp8 a layer's linears as e4m3, whose scales are then read by their own name; both are read whole.
  shard::DType type_of(const std::string& name) const;
  /// Bytes that read() gives.
  std::uint64_t bytes_of(const std::string& name, Index lo = 0, Index count = -1) const;
  /// A weight in its file's memory, for as long as the weight is held; not looked at.
  struct View {
    Weight weight;
    std::span<const std::byte> bytes;
    shard::RangeReader::Run run;
  };
  /// Where the weight's bytes lie there as products take them.
  std::optional<View> view(const std::string& name, Index lo = 0, Index count = -1);
  /// Reads now, or views. A vector is one row.
  Weight read(const std::string& name, Index lo = 0, Index count = -1);
  /// Rows of a table, one for each id, as f32 [ids, columns]; ids outside [lo, hi) give zeros.
  Tensor gather(const std::string& name, std::span<const Index> ids, Index lo, Index hi);
  /// Whether values are finite, a matrix is more than one number repeated, and how large they are. `lo` is its first row.
  void check(const std::string& name, Index lo, const Weight& weight);
  /// The same, and its checksum, brought from its file by so many threads.
  void check(const std::string& name, Index lo, const View& view, unsigned threads);
  /// What reading found: checksums that do not match (with the budget's threads for the rest of summed streams), numbers.
  std::vector<shard::Finding> findings(const shard::Budget& budget);
  /// Of everything that was read, by name.
  std::vector<WeightStats> stats() const;
  /// What was seen and summed here, for a source of the same checkpoint in another process, whose findings and stats will be of both. Throws Io where a
  /// file became shorter.
  std::string tell() const;
  void hear(std::string_view text);
  std::uint64_t bytes_read() const { return source_.bytes_read() + viewed_; }

 private:
  /// Rows that were looked at together.
  struct Seen {
    std::uint64_t elements, nonfinite, first;        ///< `first` that is not finite, counted from the tensor's start
    double squares;
    float value, max_abs;
    bool constant;                                   ///< all are `value`
  };

  struct Rows {
    const shard::ShardedTensor& tensor;
    Index lo, count, columns;
    shard::DType type;  ///< that products take
  };
  Rows rows_of(const std::string& name, Index lo, Index count) const;
  std::shared_ptr<const MappedFile> mapped(std::uint32_t stream);
  bool scaled(const std::string& name) const { return scale_shapes_.contains(scales_of(name)); }
  Weight read_scaled(const std::string& name);
  Weight read_scales(const std::string& name);
  void note(const std::string& name, Index lo, const Weight& weight, const Sight& sight);
  bool is_matrix(const std::string& name) const;
  void refuse_torn() const;

  const shard::ShardedStateDict& dict_;
  const shard::Kernels& kernels_;
  Compute compute_;
  shard::SummedSource source_;
  mutable std::mutex mutex_;
  std::map<std::string, std::map<Index, Seen>> seen_;  ///< by name and first row
  std::map<std::uint32_t, std::shared_ptr<const MappedFile>> mapped_;  ///< by file
  std::map<std::string, shard::Shape> scale_shapes_;   ///< by the scales' name
  std::map<std::string, Weight> scales_;               ///< found when their weight was read
  std::vector<std::string> rescaled_;                  ///< weights that are stored in blocks of their own, which are none of products'
  std::atomic<std::uint64_t> viewed_ = 0;
};

/// A rank's parts of weights as its layers ask for them, in the memory of the rank's ops.
class Weights {
 public:
  virtual ~Weights() = default;
  virtual bool has(const std::string& name) const = 0;
  /// The rank's rows of it from `lo` on. None where it needs nothing of them. Throws Mismatch where the model holds no such weight.
  virtual Weight take(const std::string& name, Index lo = 0) = 0;
  /// Rows of a table, one for each id [ids, columns]; ids outside [lo, hi) give zeros.
  virtual Tensor gather(const std::string& name, const Ids& ids, Index lo, Index hi) = 0;
};

/// Reads `plan` ahead on a thread of its own, whole weights. Thread safe for several takers.
class WeightStream {
 public:
  /// `budget`: bytes that may lie read and not let go; one weight is always allowed. `threads`: for looking at weights in files.
  WeightStream(WeightSource& source, std::vector<WeightUse> plan, std::uint64_t budget, const std::atomic<bool>* stop, unsigned threads = 1);
  ~WeightStream();
  /// Waits for it. Throws what reading threw, Mismatch for what is not planned.
  Weight take(const std::string& name, Index lo = 0);
  bool has(const std::string& name) const { return source_.has(name); }
  Tensor gather(const std::string& name, const Ids& ids, Index lo, Index hi) { return source_.gather(name, ids.host, lo, hi); }
  const WeightSource& source() const { return source_; }
  /// Waits until all of the plan was read and looked at.
  void drain();
  /// What takers together waited for weights, and looked at them.
  double waited_seconds() const { return waited_; }

 private:
  struct Entry {
    enum class State { Coming, Unseen, BeingSeen, Ready };
    WeightUse use;
    Weight weight;
    std::optional<WeightSource::View> unseen;
    State state = State::Coming;
    int left = 0;
  };
  void run();
  /// Until an entry is ready.
  void await(std::size_t number);
  void bring(std::size_t number);
  void see(std::unique_lock<std::mutex>& lock, Entry& entry);

  WeightSource& source_;
  std::vector<Entry> entries_;
  std::map<std::pair<std::string, Index>, std::size_t> index_;
  std::uint64_t budget_;
  const std::atomic<bool>* stop_;
  unsigned threads_;
  std::atomic<double> waited_ = 0;
  struct Held {  // shared with the weights handed out, which may outlive the stream
    std::mutex mutex;
    std::condition_variable changed;
    std::uint64_t bytes = 0;
  };
  std::shared_ptr<Held> held_ = std::make_shared<Held>();
  std::size_t wanted_ = 0;  ///< entries up to here are waited for
  bool done_ = false, quit_ = false;
  std::exception_ptr error_;
  std::thread thread_;
};

}  // namespace lm
