// A deployed model: its file, and a step on the atoms of a part of space. potential.h has the interface,
// gaq/deployed/form.py says what is in a file.

#include "potential.h"

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "matrices.h"
#include "signatures.h"

extern "C" {
GAQ_DECLARE_KERNELS(float32, float)
GAQ_DECLARE_KERNELS(float64, double)
}

namespace {

constexpr int64_t COEFFICIENTS = GAQ_COEFFICIENTS;

template <typename T> struct Name;
template <> struct Name<uint8_t> {
  static constexpr const char* value = "U8";
};
template <> struct Name<int64_t> {
  static constexpr const char* value = "I64";
};
template <> struct Name<float> {
  static constexpr const char* value = "F32";
};
template <> struct Name<double> {
  static constexpr const char* value = "F64";
};

// A file in the format safetensors: the length of a header, the header as JSON, and numbers.
class File {
 public:
  explicit File(const std::string& path) : stream(std::fopen(path.c_str(), "rb"), std::fclose) {
    if (!stream) throw std::runtime_error("there is no such file, or it cannot be read");
    uint64_t length = 0;
    if (std::fread(&length, 8, 1, stream.get()) != 1 || length > MOST) throw foreign();
    header.resize(length);
    if (std::fread(&header[0], 1, length, stream.get()) != length) throw foreign();
    if (header.find("\"gaq_deployed\":") == std::string::npos) throw foreign();
    start = 8 + int64_t(length);
  }

  bool has(const std::string& name) const { return header.find(key(name)) != std::string::npos; }

  template <typename T> std::vector<T> read(const std::string& name) const {
    const size_t at = header.find(key(name));
    if (at == std::string::npos) throw std::runtime_error("it is damaged: \"" + name + "\" is missing");
    const std::string entry = header.substr(at + key(name).size(), header.find('}', at) - at - key(name).size());
    int64_t begin = -1, end = -1;
    const size_t offsets = entry.find("\"data_offsets\":[");
    if (entry.find(std::string("\"dtype\":\"") + Name<T>::value + '"') == std::string::npos ||
        offsets == std::string::npos ||
        std::sscanf(entry.c_str() + offsets + 16, "%lld,%lld", (long long*)&begin, (long long*)&end) != 2 ||
        begin < 0 || end < begin || (end - begin) % int64_t(sizeof(T)))
      throw std::runtime_error("it is damaged: \"" + name + "\" is described wrongly");
    std::vector<T> values((end - begin) / sizeof(T));
    if (std::fseek(stream.get(), long(start + begin), SEEK_SET) ||
        std::fread(values.data(), sizeof(T), values.size(), stream.get()) != values.size())
      throw std::runtime_error("it is cut off");
    return values;
  }

  std::vector<std::string> names(const std::string& name) const {
    std::vector<std::string> found(1);
    for (const uint8_t letter : read<uint8_t>(name))
      if (letter == '\n')
        found.emplace_back();
      else
        found.back().push_back(char(letter));
    return found;
  }

 private:
  static constexpr uint64_t MOST = 100 << 20;  // bytes of a header; longer ones are of other files

  std::unique_ptr<FILE, int (*)(FILE*)> stream;
  std::string header;
  int64_t start;

  static std::string key(const std::string& name) { return '"' + name + "\":{"; }
  static std::runtime_error foreign() { return std::runtime_error("it is not a file that `gaq deploy` writes"); }
};

std::string joined(const std::vector<std::string>& names) {
  std::string all;
  for (const std::string& name : names) all += (all.empty() ? "" : ", ") + name;
  return all;
}

int64_t position(const std::vector<std::string>& names, const std::string& name) {
  return std::find(names.begin(), names.end(), name) - names.begin();
}

template <typename T> struct Kernels;
#define GAQ_USE(NAME, T)                                       \
  template <> struct Kernels<T> {                              \
    static constexpr auto make = gaq_program_new_##NAME;       \
    static constexpr auto destroy = gaq_program_delete_##NAME; \
    static constexpr auto run = gaq_program_run_##NAME;        \
  };
GAQ_USE(float32, float)
GAQ_USE(float64, double)

// Who exchanges the features of a step.
struct Exchanging {
  gaq_exchange exchange;
  void* context;
};

template <typename T> void pass_on(void* context, int64_t back, T* rows, int64_t width) {
  const Exchanging& who = *static_cast<const Exchanging*>(context);
  if (who.exchange) who.exchange(who.context, back, rows, width);
}

}  // namespace

struct gaq_potential {
  double r_max = 0;
  int64_t width = 0, bytes = 0;

  virtual ~gaq_potential() = default;
  virtual void compute(int64_t local, int64_t all, const int64_t* type, int64_t edges, const int64_t* sender,
                       const int64_t* receiver, const double* vectors, Exchanging who, int64_t threads,
                       double* energies, double* gradient) const = 0;
};

namespace {

template <typename T> class Potential final : public gaq_potential {
 public:
  // `species` are those of the caller's types, as the file numbers them.
  Potential(const File& file, const std::vector<int64_t>& form, std::vector<int64_t> species, int64_t head)
      : species(std::move(species)), head(head) {
    count = form[2], layers = form[4];
    width = form[5], bytes = sizeof(T);
    r_max = file.read<double>("r_max").at(0);
    isolated = file.read<double>("isolated_atoms");
    number_pairs(file.read<int64_t>("pairs"));
    densities.resize(layers), density_intervals.assign(layers, 0), weights.resize(layers);
    for (int64_t layer = 0; layer < layers; ++layer) read_layer(file, layer, std::to_string(layer) + '.');
    const auto code = file.read<int64_t>("code"), ints = file.read<int64_t>("ints");
    const auto reals = file.read<double>("reals");
    const auto constants = file.read<T>("constants"), matrices = file.read<T>("weights");
    Kernels<T>::make(code.data(), code.size(), ints.data(), ints.size(), reals.data(), reals.size(), constants.data(),
                     constants.size(), matrices.data(), &program);
  }
  ~Potential() override { Kernels<T>::destroy(program); }

  void compute(int64_t local, int64_t all, const int64_t* type, int64_t edges, const int64_t* sender,
               const int64_t* receiver, const double* vectors, Exchanging who, int64_t threads, double* energies,
               double* gradient) const override {
    Working& w = *of_thread<Working>();
    sort_atoms(w, local, all, type);
    take_edges(w, edges, sender, receiver, vectors);
    const int64_t kept = w.edge.size();
    w.gradient.resize(3 * kept + 1);
    w.energies.resize(local + 1);
    const int64_t counts[] = {local, all, kept, int64_t(w.slices.size()) / 3, threads, layers};
    std::vector<const int64_t*> integers = {w.sender.data(), w.receiver.data(), tables > 1 ? w.table.data() : nullptr,
                                            w.sorted.data(), w.sending.data(),  w.slices.data(),
                                            w.head.data(),   w.order.data(),    density_intervals.data(),
                                            nullptr};
    std::vector<const double*> reals;
    std::vector<const T*> inputs = {w.vectors.data()};
    for (int64_t i = 0; i < layers; ++i) integers.push_back(plan_ints[i].data()), reals.push_back(plan_reals[i].data());
    for (const std::vector<T>& of : weights) inputs.push_back(of.data());
    for (const std::vector<T>& of : densities) inputs.push_back(of.empty() ? nullptr : of.data());
    std::vector<T*> outputs(1 + layers, nullptr);  // nothing is exported
    outputs[0] = w.gradient.data();
    Kernels<T>::run(program, counts, integers.data(), reals.data(), inputs.data(), outputs.data(), w.energies.data(),
                    nullptr, reinterpret_cast<int64_t>(&pass_on<T>), reinterpret_cast<int64_t>(&who));
    for (int64_t i = 0; i < local; ++i)
      energies[w.order[i]] = species[type[w.order[i]]] < 0 ? 0.0 : w.energies[i] + isolated[head * count + w.sorted[i]];
    std::fill(gradient, gradient + 3 * edges, 0.0);
    for (int64_t e = 0; e < kept; ++e)
      for (int k = 0; k < 3; ++k) gradient[3 * w.edge[e] + k] = double(w.gradient[3 * e + k]);
  }

 private:
  // Of a step: atoms sorted by species, and the edges within the cutoff.
  struct Working {
    std::vector<int64_t> sending, order, place, sorted, slices, head, edge, sender, receiver, table, next;
    std::vector<T> vectors, gradient;
    std::vector<double> energies;
  };

  int64_t program = 0, count = 0, layers = 0, tables = 0;
  std::vector<int64_t> species;
  int64_t head;
  std::vector<double> isolated;            // energies of isolated atoms, (heads, species)
  std::vector<int64_t> pairs;              // number of the radial table of each pair of species, -1 for those not used
  std::vector<int64_t> used;               // tables of the file that are used, in their order here
  std::vector<int64_t> density_intervals;  // of each layer
  std::vector<std::vector<int64_t>> plan_ints;
  std::vector<std::vector<double>> plan_reals;
  std::vector<std::vector<T>> weights, densities;

  // Keeps the radial tables of the pairs of species that the caller has.
  void number_pairs(const std::vector<int64_t>& of_file) {
    pairs.assign(count * count, -1);
    for (const int64_t a : species)
      for (const int64_t b : species) {
        if (a < 0 || b < 0) continue;
        const int64_t table = of_file.at(a * count + b);
        const auto found = std::find(used.begin(), used.end(), table);
        pairs[a * count + b] = found - used.begin();
        if (found == used.end()) used.push_back(table);
      }
    tables = used.size();
  }

  void read_layer(const File& file, int64_t layer, const std::string& name) {
    plan_ints.push_back(file.read<int64_t>(name + "plan_ints"));
    plan_reals.push_back(file.read<double>(name + "plan_reals"));
    const int64_t channels = plan_ints.back().at(0), paths = plan_ints.back().at(2);
    const int64_t intervals = plan_ints.back().at(4), rows = intervals * COEFFICIENTS;
    const auto hidden = file.read<double>(name + "tables"), last = file.read<double>(name + "last");
    const int64_t features = last.size() / (paths * channels);
    // What the network is before its last layer, which is linear, times that layer.
    std::vector<T>& to = weights[layer];
    to.resize(tables * paths * rows * channels);
    std::vector<double> product(rows * channels);
    for (int64_t path = 0; path < paths; ++path) {
      const Packed<double> matrix(last.data() + path * features * channels, features, channels, false);
      for (int64_t table = 0; table < tables; ++table) {
        const double* from = hidden.data() + used[table] * rows * features;
        if (used[table] * rows * features + rows * features > int64_t(hidden.size()))
          throw std::runtime_error("it is damaged: radial tables are missing");
        matrix.multiply(Rows<const double>{from, 1, features, 0}, Rows<double>{product.data(), 1, channels, 0}, 0, rows,
                        false, 1);
        std::copy(product.begin(), product.end(), to.begin() + (table * paths + path) * rows * channels);
      }
    }
    if (!file.has(name + "density")) return;
    const auto density = file.read<double>(name + "density");
    const int64_t size = file.read<int64_t>(name + "density_size").at(0);  // of a table
    density_intervals[layer] = size / COEFFICIENTS;
    for (const int64_t table : used)
      densities[layer].insert(densities[layer].end(), density.begin() + table * size,
                              density.begin() + (table + 1) * size);
  }

  void sort_atoms(Working& w, int64_t local, int64_t all, const int64_t* type) const {
    w.sending.resize(all + 1);
    // An atom that does not take part has no edges, and counts as one of the first species.
    for (int64_t i = 0; i < all; ++i) w.sending[i] = std::max<int64_t>(species[type[i]], 0);
    w.next.assign(count + 1, 0);
    for (int64_t i = 0; i < local; ++i) ++w.next[w.sending[i] + 1];
    w.slices.clear();
    for (int64_t z = 0; z < count; ++z) {
      if (w.next[z + 1]) w.slices.insert(w.slices.end(), {z, w.next[z], w.next[z] + w.next[z + 1]});
      w.next[z + 1] += w.next[z];
    }
    for (std::vector<int64_t>* of : {&w.order, &w.place, &w.sorted}) of->resize(local + 1);
    w.head.assign(local + 1, head);
    for (int64_t i = 0; i < local; ++i) {
      const int64_t at = w.next[w.sending[i]]++;
      w.order[at] = i, w.place[i] = at, w.sorted[at] = w.sending[i];
    }
  }

  void take_edges(Working& w, int64_t edges, const int64_t* sender, const int64_t* receiver,
                  const double* vectors) const {
    for (std::vector<int64_t>* of : {&w.edge, &w.sender, &w.receiver, &w.table}) of->clear();
    w.vectors.clear();
    for (int64_t e = 0; e < edges; ++e) {
      const double* v = vectors + 3 * e;
      if (!(v[0] * v[0] + v[1] * v[1] + v[2] * v[2] < r_max * r_max)) continue;
      w.edge.push_back(e), w.sender.push_back(sender[e]), w.receiver.push_back(w.place[receiver[e]]);
      w.table.push_back(pairs[w.sending[sender[e]] * count + w.sending[receiver[e]]]);
      for (int k = 0; k < 3; ++k) w.vectors.push_back(T(v[k]));
    }
  }
};

std::unique_ptr<gaq_potential> opened(const char* path, int64_t types, const char* const* symbols, const char* head) {
  const File file(path);
  const std::vector<int64_t> form = file.read<int64_t>("form");
  if (form.size() < 6 || form[0] != GAQ_DEPLOYED_VERSION)
    throw std::runtime_error("it is of another version (" + (form.empty() ? "?" : std::to_string(form[0])) +
                             "; this program reads " + std::to_string(GAQ_DEPLOYED_VERSION) +
                             "): make it again with `gaq deploy`");
  const std::vector<std::string> names = file.names("elements"), heads = file.names("heads");
  std::vector<int64_t> species;
  for (int64_t i = 0; i < types; ++i) {
    if (!symbols[i]) {  // a type of which another potential takes care
      species.push_back(-1);
      continue;
    }
    species.push_back(position(names, symbols[i]));
    if (species.back() == int64_t(names.size()))
      throw std::runtime_error(std::string("it does not know the element ") + symbols[i] + "; it knows " +
                               joined(names));
  }
  const int64_t number = head ? position(heads, head) : 0;
  if (number == int64_t(heads.size()))
    throw std::runtime_error(std::string("it has no head ") + head + "; it has " + joined(heads));
  if (form[1] == 4) return std::make_unique<Potential<float>>(file, form, species, number);
  return std::make_unique<Potential<double>>(file, form, species, number);
}

}  // namespace

extern "C" {

gaq_potential* gaq_potential_open(const char* file, int64_t types, const char* const* symbols, const char* head,
                                  char* message, int64_t size) {
  try {
    return opened(file, types, symbols, head).release();
  } catch (const std::exception& error) {
    std::snprintf(message, size_t(size), "%s: %s", file, error.what());
    return nullptr;
  }
}

void gaq_potential_close(gaq_potential* potential) { delete potential; }
double gaq_potential_cutoff(const gaq_potential* potential) { return potential->r_max; }
int64_t gaq_potential_width(const gaq_potential* potential) { return potential->width; }
int64_t gaq_potential_bytes(const gaq_potential* potential) { return potential->bytes; }

void gaq_potential_compute(const gaq_potential* potential, int64_t local, int64_t all, const int64_t* type,
                           int64_t edges, const int64_t* sender, const int64_t* receiver, const double* vectors,
                           gaq_exchange exchange, void* context, int64_t threads, double* energies, double* gradient) {
  potential->compute(local, all, type, edges, sender, receiver, vectors, {exchange, context}, threads, energies,
                     gradient);
}
}
