// shardkit reshard, convert and plan: open → describe → plan → execute → commit.
#include "cli/commands.h"
#include "cli/crew.h"
#include "cli/device.h"
#include "cli/fingerprint.h"
#include "cli/markup.h"
#include "cli/options.h"
#include "cli/parts.h"
#include "cli/print.h"
#include "cli/receipt.h"
#include "cli/report_files.h"
#include "cli/replaced.h"
#include "formats/hf/lora.h"
#include "formats/hf/state.h"
#include "formats/kernels.h"
#include "formats/target.h"
#include "gpu/reshard/execute.h"
#include "libshard/error.h"
#include "libshard/numeric.h"

#include <chrono>

#include <unistd.h>

namespace cli {
namespace {

struct ConvertAsk {
  std::string from, to, format, dtype, adapter, max_shard_size = "1GB", pad = "zeros", report, part;
  std::optional<std::int64_t> tp, pp, vpp, ep, etp, first, last;
  std::optional<std::string> pp_layout;
  bool force = false, no_sync = false, weights_only = false, dry_run = false, merge_lora = false;
  ModelOptions model;
  RunOptions run;
};

/// Sizes left out are kept from the source; a new pipeline forgets what only fitted the old one.
shard::Parallel wanted_layout(const ConvertAsk& ask, const formats::Checkpoint& source) {
  auto out = source.parallel.value_or(shard::Parallel{});
  const bool etp_follows = out.etp == out.tp;
  if (ask.pp || ask.vpp) {
    out.first_stage_layers = out.last_stage_layers = std::nullopt;
    out.pp_layout.clear();
  }
  if (ask.tp) out.tp = *ask.tp;
  if (ask.pp) out.pp = *ask.pp;
  if (ask.pp && *ask.pp == 1) out.vpp = 1;
  if (ask.vpp) out.vpp = *ask.vpp;
  if (ask.ep) out.ep = *ask.ep;
  out.etp = ask.etp ? *ask.etp : etp_follows ? out.tp : out.etp;
  if (ask.first) out.first_stage_layers = *ask.first;
  if (ask.last) out.last_stage_layers = *ask.last;
  if (ask.pp_layout) {
    out.pp_layout = *ask.pp_layout;
    out.first_stage_layers = out.last_stage_layers = std::nullopt;
    out.account_for_embedding = out.account_for_loss = false;
    if (!ask.vpp) out.vpp = 1;
  }
  return out;
}

shard::Pad wanted_pad(const std::string& text) { return text == "last" ? shard::Pad::Last : text == "mean" ? shard::Pad::Mean : shard::Pad::Zeros; }

formats::TargetOptions target_options(const ConvertAsk& ask, const formats::Checkpoint& source) {
  formats::TargetOptions out;
  out.format = ask.format.empty() ? source.format : ask.format;
  out.keep_spelling = ask.format.empty() || ask.format == source.format;
  out.parallel = wanted_layout(ask, source);
  out.max_shard_size = parse_size(ask.max_shard_size, "--max-shard-size");
  out.force = ask.force;
  if (!ask.dtype.empty()) {
    out.dtype = shard::dtype_named(ask.dtype);
    shard::require(out.dtype && shard::castable(shard::DType::F32, *out.dtype), shard::Code::Usage,
                   [&] { return fmt::format("--dtype {}: is no floating type to cast to; f32, bf16, f16, f64, f8_e4m3 and f8_e5m2 are", ask.dtype); });
  }
  return out;
}

/// What quantised weights are dequantised to; types as narrow as theirs are not.
std::optional<shard::DType> wanted_weights(const ConvertAsk& ask) {
  const auto dtype = shard::dtype_named(ask.dtype);
  return dtype && (*dtype == shard::DType::BF16 || *dtype == shard::DType::F16 || *dtype == shard::DType::F32 || *dtype == shard::DType::F64) ? dtype : std::nullopt;
}

/// The mean row of a vocabulary tensor over its true rows, in its own type.
std::vector<std::byte> mean_row(const formats::LocalReader& reader, const shard::ShardedTensor& tensor, std::optional<shard::Index> vocab) {
  const auto rows = vocab ? std::min(*vocab, tensor.global_shape[0]) : tensor.global_shape[0];
  const auto width = static_cast<std::size_t>(shard::volume(tensor.global_shape) / tensor.global_shape[0]);
  const auto item = size_of(tensor.dtype);
  std::vector<double> sums(width);
  std::vector<std::byte> row(width * item);
  std::vector<bool> seen(static_cast<std::size_t>(rows));
  for (const auto& shard : tensor.shards)
    for (shard::Index i = shard.box.lo[0]; i < std::min(rows, shard.box.lo[0] + shard.box.size[0]); ++i) {
      if (seen[static_cast<std::size_t>(i)] || shard.box.size[1] != tensor.global_shape[1]) continue;
      seen[static_cast<std::size_t>(i)] = true;
      reader.read(shard.place.stream, shard.place.offset + static_cast<std::uint64_t>((i - shard.box.lo[0]) * shard.place.stride[0]), row);
      for (std::size_t c = 0; c < width; ++c) sums[c] += shard::value_at(row.data() + c * item, tensor.dtype);
    }
  std::vector<double> mean(width);
  for (std::size_t c = 0; c < width; ++c) mean[c] = rows ? sums[c] / static_cast<double>(rows) : 0;
  shard::cast(std::as_bytes(std::span(mean)), shard::DType::F64, row, tensor.dtype);
  return row;
}

Json dropped_json(const std::vector<formats::Dropped>& dropped) {
  auto out = Json::array();
  for (const auto& item : dropped) out.push_back({{"key", item.key}, {"why", item.why}});
  return out;
}

struct Outcome {
  const formats::Checkpoint& source;
  const formats::Target& target;
  const formats::TargetOptions& options;
  std::vector<formats::Dropped> dropped;
  std::vector<std::string> filled, files;
  Device device;
  gpu::reshard::Outcome run;   ///< on the CPU only the report
  double seconds;
  const shard::Report& report() const { return run.report; }
};

bool is_cut(const formats::TargetOptions& options) { return options.format == "torch_dist" || options.format == "mp_rank"; }

Json outcome_json(const ConvertAsk& ask, const Outcome& outcome) {
  auto ties = Json::array();
  for (const auto& [alias, owner] : outcome.source.logical.ties) ties.push_back({{"alias", alias}, {"owner", owner}});
  Json out{{"source", {{"path", ask.from}, {"format", outcome.source.format}, {"layout", layout_json(outcome.source.parallel)}}},
           {"target", {{"path", ask.to}, {"format", outcome.options.format}, {"layout", is_cut(outcome.options) ? layout_json(outcome.options.parallel) : Json(nullptr)}, {"files", outcome.files}}},
           {"bytes_read", outcome.report().bytes_read},
           {"bytes_written", outcome.report().bytes_written},
           {"bytes_copied_in_kernel", outcome.report().bytes_copied_in_kernel},
           {"bytes_through_device", outcome.report().bytes_through_device},
           {"device", outcome.device.name},
           {"device_why", outcome.device.why},
           {"seconds", outcome.seconds},
           {"peak_memory_bytes", peak_memory()},
           {"tensors", outcome.target.logical.tensors.size()},
           {"dropped", dropped_json(outcome.dropped)},
           {"carried", outcome.target.carried},
           {"tied", ties},
           {"padded", outcome.filled}};
  if (!outcome.device.cuda.empty())
    out["device_use"] = {{"model", outcome.device.model}, {"storage", outcome.run.storage}, {"lanes", outcome.run.sizes.lanes}, {"devices", outcome.run.sizes.devices}, {"image_bytes", outcome.run.sizes.image},
                         {"pinned_memory_bytes", outcome.run.sizes.pinned_memory}, {"device_memory_bytes", outcome.run.sizes.device_memory}};
  if (outcome.target.padded_vocab) out["padded_vocab_size"] = outcome.target.padded_vocab;
  if (!outcome.target.notes.empty()) out["notes"] = outcome.target.notes;
  return out;
}

void print_summary(const ConvertAsk& ask, const Outcome& outcome) {
  const auto& report = outcome.report();
  fmt::print(stderr, "{} {} → {}: {} tensors, {} in {:.2f} s ({}/s), {} files\n", ask.dry_run ? "would write" : "wrote", outcome.source.format, outcome.options.format,
             outcome.target.logical.tensors.size(), human_bytes(report.bytes_written), outcome.seconds,
             human_bytes(static_cast<std::uint64_t>(static_cast<double>(report.bytes_written) / std::max(outcome.seconds, 1e-6))), outcome.files.size());
  if (ask.run.device != "cpu" || ask.run.verbose) fmt::print(stderr, "device: {}{} ({})\n", outcome.device.name, outcome.device.cuda.empty() ? "" : ", " + outcome.device.model, outcome.device.why);
  if (ask.run.verbose && !ask.dry_run) {
    fmt::print(stderr, "bytes written: {} through the device, {} copied in the kernel, {} by the CPU\n", human_bytes(report.bytes_through_device), human_bytes(report.bytes_copied_in_kernel),
               human_bytes(report.bytes_written - report.bytes_through_device - report.bytes_copied_in_kernel));
    const auto& sizes = outcome.run.sizes;
    if (!outcome.device.cuda.empty())
      fmt::print(stderr, "storage: {}\nlanes: {} of two images of {} bytes, on {} device{}\n", outcome.run.storage, sizes.lanes, sizes.image, sizes.devices, sizes.devices == 1 ? "" : "s");
  }
  if (is_cut(outcome.options)) fmt::print(stderr, "layout: {} → {}\n", outcome.source.parallel ? layout_line(*outcome.source.parallel) : "unknown", layout_line(outcome.options.parallel));
  for (const auto& [alias, owner] : outcome.source.logical.ties) fmt::print(stderr, "{}\n", one_line(fmt::format("tied: {} is {}", alias, owner)));
  for (const auto& key : outcome.filled) fmt::print(stderr, "padded: new rows of {} are {}\n", one_line(key), ask.pad == "zeros" ? "zero" : ask.pad == "last" ? "copies of its last row" : "its mean row");
  for (const auto& note : outcome.target.notes) fmt::print(stderr, "note: {}\n", one_line(note));
  for (const auto& item : outcome.dropped) fmt::print(stderr, "{}\n", one_line(fmt::format("dropped: {} ({})", item.key, item.why)));
}

std::vector<formats::Dropped> all_dropped(const formats::Checkpoint& source, const formats::Target& target) {
  auto out = source.not_carried;
  for (const auto& key : source.optimizer) out.push_back({key, "optimizer state; --weights-only"});
  for (const auto& object : source.stored.objects)
    if (object.kind == "optimizer") out.push_back({object.key, "optimizer state; --weights-only"});
  out.insert(out.end(), target.dropped.begin(), target.dropped.end());
  return out;
}

/// Where a target that is only planned is laid out: its small files, and large ones without bytes.
std::filesystem::path planning_folder() {
  std::error_code error;
  const auto folder = std::filesystem::temp_directory_path(error);
  const char* told = std::getenv("TMPDIR");
  shard::require(!error, shard::Code::Io, [&] { return fmt::format("{}: {}; a plan lays the target's files out there, TMPDIR names another folder", told ? told : "/tmp", error.message()); });
  return folder / fmt::format("shardkit-plan-{}", ::getpid());
}

/// A conversion's source, and the adapter that is merged into it; "" where none is.
struct Origin {
  std::string base, adapter;
  std::vector<std::string> notes;
};

/// --merge-lora takes the adapter that --adapter names, or the one that lies in SRC: beside its base, or alone with the base's name.
Origin origin_of(const ConvertAsk& ask) {
  shard::require(ask.merge_lora || ask.adapter.empty(), shard::Code::Usage, [] { return "--adapter: has no meaning without --merge-lora"; });
  if (!ask.merge_lora || !ask.adapter.empty()) return {ask.from, ask.adapter, {}};
  shard::require(std::filesystem::exists(ask.from), shard::Code::NotFound, [&] { return fmt::format("{}: not found", ask.from); });
  shard::require(formats::hf::is_adapter(ask.from), shard::Code::Usage, [&] { return fmt::format("--merge-lora: {} holds no adapter_config.json; --adapter names the adapter's folder", ask.from); });
  if (!formats::hf::is_bare_adapter(ask.from)) return {ask.from, ask.from, {}};
  const auto base = formats::hf::read_lora_config(ask.from).base;
  shard::require(std::filesystem::is_directory(base), shard::Code::NotFound,
                 [&] { return fmt::format("{}: its base '{}' is no folder here; give the base as SRC and this folder as --adapter", ask.from, base); });
  return {base, ask.from, {fmt::format("the base is {}, as adapter_config.json says", base)}};
}

/// Options that shape the output, as all who write it together must have them.
Json shaping_options(const ConvertAsk& ask, const formats::TargetOptions& options) {
  const auto& model = ask.model.open;
  const auto& parallel = options.parallel;
  Json out{{"--to", options.format}, {"spelling", options.keep_spelling ? "the source's" : "the target's"}, {"--max-shard-size", options.max_shard_size}, {"--pad", ask.pad},
           {"--weights-only", ask.weights_only}, {"--merge-lora", ask.merge_lora}, {"--tp", parallel.tp}, {"--pp", parallel.pp}, {"--vpp", parallel.vpp}, {"--ep", parallel.ep}, {"--etp", parallel.etp}};
  if (!ask.dtype.empty()) out["--dtype"] = ask.dtype;
  if (!parallel.pp_layout.empty()) out["--pp-layout"] = parallel.pp_layout;
  if (parallel.first_stage_layers) out["--first-stage-layers"] = *parallel.first_stage_layers;
  if (parallel.last_stage_layers) out["--last-stage-layers"] = *parallel.last_stage_layers;
  if (model.vocab) out["--vocab-size"] = *model.vocab;
  if (!model.drop.empty()) out["--drop"] = model.drop;
  if (!model.family.empty()) out["--family"] = std::filesystem::is_regular_file(model.family) ? "of digest " + digest_of(formats::read_text(model.family)) : model.family;
  if (!model.parameters.empty()) out["sizes"] = model.parameters;
  return out;
}

/// --device; ranks of one host take its devices in turn.
Device device_of(const ConvertAsk& ask, const Crew* crew) {
  const auto all = choose_device(ask.run.device);
  if (!crew || all.cuda.size() < 2) return all;
  return choose_device(fmt::format("cuda:{}", all.cuda[static_cast<std::size_t>(crew->local_rank()) % all.cuda.size()]));
}

/// `crew`: the ranks that this process is one of, or null.
int run_convert(const ConvertAsk& ask, Crew* crew) {
  const auto start = std::chrono::steady_clock::now();
  const auto device = device_of(ask, crew);
  const auto budget = ask.run.limits();
  if (ask.report.empty() || !formats::lies_in(ask.report, ask.to)) require_writable({{"--report", ask.report}}, ask.from);  // DST is not there yet
  auto open = ask.model.open;
  open.threads = budget.threads;
  const auto origin = origin_of(ask);
  open.adapter = origin.adapter;
  open.dequantise = wanted_weights(ask);
  const auto source = formats::open(origin.base, open);                                                   // open
  shard::require(!source.needs_weights_only || ask.weights_only, shard::Code::BadFormat,
                 [&] { return fmt::format("{}: holds optimizer state, which cannot be placed in another layout yet; --weights-only drops it", ask.from); });
  refuse(source.findings);
  check_dropped(ask.model.open, {&source});
  if (const auto recorded = source.recorded_vocab)  // comparing fewer rows is fine, losing them is not
    shard::require(*source.vocab >= *recorded, shard::Code::Mismatch,
                   [&] { return fmt::format("--vocab-size {}: {} records {} tokens; the last {} would be cut off", *source.vocab, ask.from, *recorded, *recorded - *source.vocab); });
  auto options = target_options(ask, source);
  const bool carries = source.format == "dcp" && options.format == "dcp" && !source.stored.objects.empty();  // bytes items travel, too
  shard::require(!source.logical.tensors.empty() || carries, shard::Code::Mismatch, [&] { return fmt::format("{}: holds no tensors", ask.from); });
  const auto carried = source.hf && options.format != "hf" ? source.hf->folder : std::filesystem::path();  // what a run's hf/ holds is in a new hf/, too
  if (ask.force) refuse_source_in_target(ask.to, {ask.from, origin.base, origin.adapter, open.family, carried}, source);
  const auto path = ask.dry_run ? planning_folder() : std::filesystem::path(ask.to);
  if (ask.dry_run && !ask.force)
    shard::require(ask.to.empty() || !std::filesystem::exists(ask.to), shard::Code::Usage, [&] { return fmt::format("{}: exists; --force replaces it", ask.to); });
  const auto part = crew ? std::optional(crew->part()) : ask.part.empty() || ask.dry_run ? std::nullopt : std::optional(parse_part(ask.part));
  options.joint = part.has_value();
  const auto identity = part ? Fingerprint{shaping_options(ask, options), source_facts(source, origin.adapter)} : Fingerprint{};
  const bool late = ask.dry_run || !ask.part.empty();  // DST may not be there in the end: refused before others meet a folder
  if (late) refuse_report_in_target(ask.report, ask.to, {}, late);
  auto joint = part && !crew ? std::optional<JointFolder>(std::in_place, path, *part, identity, ask.force) : std::nullopt;
  auto target = formats::create(crew ? crew->folder() : joint ? joint->files() : path, source, options);                         // describe
  target.notes.insert(target.notes.begin(), source.notes.begin(), source.notes.end());
  target.notes.insert(target.notes.begin(), origin.notes.begin(), origin.notes.end());
  if (const auto lost = ask.force ? lost_iterations(ask.to) : std::string(); !lost.empty()) target.notes.insert(target.notes.begin(), lost);
  if (options.dtype && size_of(*options.dtype) < 4 && *options.dtype != shard::DType::BF16)
    target.notes.push_back(fmt::format("{} holds no larger numbers than {}: what was larger is infinite or NaN now; shardkit verify counts such numbers", shard::name(*options.dtype),
                                       *options.dtype == shard::DType::F16 ? "65504" : *options.dtype == shard::DType::F8E5M2 ? "57344" : "448"));
  const auto& filled_source = target.source ? *target.source : source;
  const formats::LocalReader reader(filled_source.logical, filled_source.files);
  const auto whole = make_plan(filled_source.logical, target.logical,                                     // plan
                              {wanted_pad(ask.pad), options.dtype.has_value(), [&](const auto& tensor) { return mean_row(reader, tensor, source.vocab); }});
  if (crew) crew->agree(identity, whole, *target.writer);
  const auto mine = part ? std::optional(part_of(whole, part->index, part->count)) : std::nullopt;
  const auto& plan = mine ? *mine : whole;
  if (!late) refuse_report_in_target(ask.report, ask.to, target.writer->folder().names(), late);
  if (joint) joint->begin();
  bool published = !ask.dry_run;
  gpu::reshard::Outcome run;
  auto& report = run.report;
  if (ask.dry_run) {
    report = measure(plan, reader, *target.writer, budget);
  } else {
    ProgressBar bar(ask.format.empty() ? "resharding" : "converting", ask.run.quiet || ask.run.json || (crew && part->index > 0));
    if (!device.cuda.empty()) run = gpu::reshard::execute(plan, reader, *target.writer, formats::kernels(), budget, {device.cuda, ask.run.device_limit()}, bar.callback());
    else report = execute(plan, reader, *target.writer, formats::kernels(), budget, bar.callback());     // execute
    refuse(report.findings);
    source.files->refuse_changed();
    if (crew && !crew->finish(report, *target.writer, !ask.no_sync)) return 0;                           // rank 0 publishes and tells
    if (!part) target.writer->commit(report.crc32, !ask.no_sync);                                        // commit
    else if (joint && !joint->finish(whole, report, *target.writer, !ask.no_sync)) {
      published = false;
      target.notes.push_back("other parts are not done yet; the last one publishes");
    }
    if (const auto packed = target.writer->packed_bytes()) report.bytes_written = *packed;  // a plan does not know it before
    if (!joint) remove_abandoned_parts(path);
    if (const auto rest = crew ? crew->left_over() : joint ? joint->left_over() : target.writer->folder().left_over(); !rest.empty())
      target.notes.push_back(fmt::format("of what {} was before, {} could not be removed", ask.to, rest));
  }
  const Outcome outcome{source, target, options, all_dropped(source, target), plan.filled, target.writer->folder().names(), device, run,
                        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count()};
  if (ask.run.json) print_json(outcome_json(ask, outcome));
  else if (!ask.run.quiet) print_summary(ask, outcome);
  if (!ask.report.empty()) {
    if (published) say_when_stopped(fmt::format("{} is published and whole, {} is not written", ask.to, ask.report));
    std::optional<ReceiptSource> receipt;
    open.adapter.clear();  // what was published holds it
    if (published) receipt.emplace(ReceiptSource{filled_source, target.writer->describe(), whole, ask.pad, outcome.files, path, open});
    write_report(ask.report, outcome_json(ask, outcome), receipt, budget, ask.run.quiet || ask.run.json);
  }
  return 0;
}

/// Alone, or as one of several ranks where a launcher's environment says so. --part and --dry-run are for single processes.
int run_alone_or_together(const ConvertAsk& ask) {
  const auto launch = ask.dry_run || !ask.part.empty() ? std::nullopt : ranks::launch_of(environment());
  if (!launch) return run_convert(ask, nullptr);
  Crew crew(*launch, ask.to, ask.force, ask.run.quiet);
  return crew.run([&] { return run_convert(ask, &crew); });
}

void add_options(CLI::App& command, ConvertAsk& ask) {
  command.add_option("SRC", ask.from, "Source checkpoint")->required();
  command.add_option("DST", ask.to, "Target folder; must not exist")->required();
  const auto size = [&](const char* flag, auto& value, const char* what) { command.add_option(flag, value, what)->check(at_least(1))->group("Layout"); };
  size("--tp", ask.tp, "Tensor parallel size");
  size("--pp", ask.pp, "Pipeline parallel size");
  size("--vpp", ask.vpp, "Virtual pipeline chunks a stage");
  size("--ep", ask.ep, "Expert parallel size");
  size("--etp", ask.etp, "Expert tensor parallel size");
  size("--first-stage-layers", ask.first, "Layers on the first stage");
  size("--last-stage-layers", ask.last, "Layers on the last stage");
  command.add_option("--pp-layout", ask.pp_layout, "Stages as text, e.g. 'Et*3|(tt|)*2,m|L'")->group("Layout");
  command.add_option("--pad", ask.pad, "New padding rows of the vocabulary")->check(CLI::IsMember({"zeros", "last", "mean"}));
  command.add_flag("--weights-only", ask.weights_only, "Drop optimizer state");
  command.add_flag("--force", ask.force, "Replace DST");
  command.add_flag("--no-sync", ask.no_sync, "Leave syncing to the system");
  command.add_option("--part", ask.part, "This process does the I-th of N parts, on storage shared with the others")->type_name("I/N");
  command.add_option("--report", ask.report, "Write the summary and a receipt, which verify --receipt checks, as JSON")->type_name("FILE.json");
  ask.model.add_to(command);
  ask.run.add_to(command);
}

void add_format(CLI::App& command, ConvertAsk& ask, bool required) {
  auto* option = command.add_option("--to", ask.format, "torch_dist, mp_rank, dcp, hf or hdf5")->type_name("FORMAT");
  if (required) option->required();
  command.add_option("--dtype", ask.dtype, "Cast floating tensors: bf16, f16, f32 …");
  command.add_option("--max-shard-size", ask.max_shard_size, "Largest safetensors file (default 1GB)")->type_name("SIZE");
  command.add_flag("--merge-lora", ask.merge_lora, "Add a LoRA adapter to the weights");
  command.add_option("--adapter", ask.adapter, "PEFT folder of the adapter that --merge-lora merges (default: SRC)")->type_name("DIR");
}

}  // namespace

void add_convert(CLI::App& app, Action& action) {
  const auto add = [&](const char* name, const char* what, bool format, bool required, bool dry) {
    auto ask = std::make_shared<ConvertAsk>();
    auto* command = app.add_subcommand(name, what);
    add_options(*command, *ask);
    if (format) add_format(*command, *ask, required);
    if (!dry) command->add_flag("--dry-run", ask->dry_run, "Say what would be done");
    command->callback([ask, dry, &action] {
      if (dry) ask->dry_run = true;
      action = [ask] { return run_alone_or_together(*ask); };
    });
  };
  add("reshard", "Another parallel layout, same format and keys", false, false, false);
  add("convert", "Another format (and layout)", true, true, false);
  add("plan", "What reshard or convert would do", true, false, true);
}

}  // namespace cli
