// What rmfast/engine/planner_python.py does, function by function; rmfast/engine/planner.py tells the design and the
// meaning of every array.

#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <numeric>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

struct Inputs {
    const int32_t* ids;
    const int64_t* first;
    const int64_t* length;
    int64_t count;
};

struct Budgets {
    int64_t batch, keep, pool, min_shared;
};

struct Text {
    int64_t at, copies, length, shared;
};

struct Segment {
    int64_t text, start, stop;
};

// Tokens that two arrays of n share. Blocks go through memcmp: texts that share 150 tokens sort in 0.6 of the time that
// a loop over single tokens takes.
int64_t shared_tokens(const int32_t* a, const int32_t* b, int64_t n) {
    constexpr int64_t kBlock = 16;
    int64_t k = 0;
    while (k + kBlock <= n && std::memcmp(a + k, b + k, kBlock * sizeof(int32_t)) == 0) k += kBlock;
    while (k < n && a[k] == b[k]) ++k;
    return k;
}

std::vector<int64_t> sorted(const Inputs& in) {
    std::vector<int64_t> order(in.count);
    std::iota(order.begin(), order.end(), 0);
    std::sort(order.begin(), order.end(), [&](int64_t i, int64_t j) {
        const int32_t *a = in.ids + in.first[i], *b = in.ids + in.first[j];
        const int64_t n = std::min(in.length[i], in.length[j]);
        const int64_t k = shared_tokens(a, b, n);
        if (k < n) return a[k] < b[k];
        return in.length[i] != in.length[j] ? in.length[i] < in.length[j] : i < j;
    });
    return order;
}

std::vector<Text> distinct(const Inputs& in, const std::vector<int64_t>& order, int64_t min_shared) {
    std::vector<Text> texts;
    for (int64_t at = 0; at < in.count; ++at) {
        const int64_t i = order[at];
        int64_t shared = 0;
        if (at > 0) {
            const int64_t last = order[at - 1];
            shared = shared_tokens(
                in.ids + in.first[last], in.ids + in.first[i], std::min(in.length[last], in.length[i]));
            if (shared == in.length[i] && shared == in.length[last]) {
                ++texts.back().copies;
                continue;
            }
        }
        texts.push_back({at, 1, in.length[i], shared >= min_shared ? shared : 0});
    }
    return texts;
}

int64_t pool_growth(int64_t start, int64_t previous, int64_t run) {
    if (start <= previous) return 0;
    return previous == run ? start - run : start;
}

// Fills `segments` with the chunk that begins at token `start` of `text`; moves both to where the next one begins.
void fill(const std::vector<Text>& texts, const Budgets& b, std::vector<Segment>& segments,
          std::vector<int64_t>& before, int64_t& text, int64_t& next) {
    const int64_t count = static_cast<int64_t>(texts.size());
    segments.clear();
    before.clear();
    int64_t start = next, rows = 0, pooled = 0, run = 0, previous = 0;
    for (; text < count; ++text) {
        const Text& t = texts[text];
        if (!segments.empty()) {
            start = t.shared;
            if (previous < start && start < previous + b.min_shared && previous < run) start = previous;
        }
        int64_t growth = pool_growth(start, previous, run);
        if (pooled + growth > b.pool && 2 * rows < b.batch) {
            start = previous;
            growth = 0;
        }
        if (rows + t.length - start > b.batch || pooled + growth > b.pool) break;
        segments.push_back({text, start, t.length});
        before.push_back(rows);
        rows += t.length - start;
        pooled += growth;
        if (growth) run = start;
        previous = start;
    }
    next = 0;
    if (text == count) return;

    const Text& t = texts[text];
    if (2 * rows < b.batch && t.length <= b.keep + b.batch) {
        const int64_t stop = std::min(start + b.batch - rows, b.keep);
        if (start < stop) {
            segments.push_back({text, start, stop});
            next = stop;
            return;
        }
    }
    if (!segments.empty()) {
        size_t end = segments.size();
        for (size_t k = segments.size() - 1; k > 0 && 4 * before[k] >= 3 * rows; --k) {
            if (segments[k].start < start) {
                end = k;
                text = segments[k].text;
                start = segments[k].start;
            }
        }
        segments.resize(end);
    } else {
        segments.push_back({text, start, t.length});
        ++text;
    }
    if (text < count) next = std::min(texts[text].shared, b.keep);
}

struct Output {
    std::vector<int64_t> input, read_index;
    std::vector<int32_t> start, stop, prefix_start, pool, keep, read;
    std::vector<int64_t> cu_segments{0}, cu_pool{0}, cu_keep{0}, cu_read{0}, cu_inputs{0};
    std::vector<int32_t> path;
    std::vector<int64_t> all_path;
    int64_t total = 0;
    bool read_all;

    Output(bool read_all, int64_t reads, int64_t longest)
        : read_index(reads), path(longest), all_path(longest), read_all(read_all) {}

    void add(const Inputs& in, const std::vector<int64_t>& order, const std::vector<Text>& texts,
             const std::vector<Segment>& segments, int64_t kept, int64_t next) {
        std::iota(path.begin(), path.begin() + kept, 0);
        const int64_t reads = static_cast<int64_t>(read.size());
        int64_t rows = 0, run = 0, previous = 0, finished = 0;
        for (const Segment& s : segments) {
            const Text& t = texts[s.text];
            if (const int64_t growth = pool_growth(s.start, previous, run)) {
                pool.insert(pool.end(), path.begin() + (s.start - growth), path.begin() + s.start);
                run = s.start;
            }
            previous = s.start;
            input.push_back(order[t.at]);
            start.push_back(static_cast<int32_t>(s.start));
            stop.push_back(static_cast<int32_t>(s.stop));
            const int64_t pooled = static_cast<int64_t>(pool.size()) - cu_pool.back();
            prefix_start.push_back(static_cast<int32_t>(s.start ? pooled - run : 0));
            std::iota(path.begin() + s.start, path.begin() + s.stop, static_cast<int32_t>(kept + rows));
            if (read_all) std::iota(all_path.begin() + s.start, all_path.begin() + s.stop, total + rows);
            rows += s.stop - s.start;
            if (s.stop != t.length) continue;
            for (int64_t c = t.at; c < t.at + t.copies; ++c) {
                const int64_t i = order[c];
                if (read_all)
                    std::copy(all_path.begin(), all_path.begin() + s.stop, read_index.begin() + in.first[i]);
                else
                    read_index[i] = static_cast<int64_t>(read.size());
            }
            if (!read_all) read.push_back(static_cast<int32_t>(rows - 1));
            finished += t.copies;
        }
        total += rows;
        if (read_all) {
            read.resize(reads + rows);
            std::iota(read.begin() + reads, read.end(), 0);
        }
        keep.insert(keep.end(), path.begin(), path.begin() + next);
        cu_segments.push_back(static_cast<int64_t>(input.size()));
        cu_pool.push_back(static_cast<int64_t>(pool.size()));
        cu_keep.push_back(static_cast<int64_t>(keep.size()));
        cu_read.push_back(static_cast<int64_t>(read.size()));
        cu_inputs.push_back(cu_inputs.back() + finished);
    }
};

// An array that owns the vector's memory.
template <typename T>
py::array array(std::vector<T>& values) {
    auto owner = std::make_unique<std::vector<T>>(std::move(values));
    const auto size = static_cast<py::ssize_t>(owner->size());
    T* data = owner->data();
    py::capsule capsule(owner.get(), [](void* p) { delete static_cast<std::vector<T>*>(p); });
    owner.release();
    return py::array_t<T>(size, data, capsule);
}

template <typename T>
using Array = py::array_t<T, py::array::c_style | py::array::forcecast>;

// Arguments are checked by rmfast.engine.planner.plan, the only caller.
py::tuple plan(const Array<int32_t>& ids, const Array<int64_t>& first, const Array<int64_t>& length, int64_t batch,
               int64_t keep, int64_t pool, int64_t min_shared, bool read_all) {
    const Inputs in{ids.data(), first.data(), length.data(), static_cast<int64_t>(length.size())};
    const Budgets budgets{batch, keep, pool, min_shared};
    const int64_t longest = in.count ? *std::max_element(in.length, in.length + in.count) : 0;
    Output out(read_all, read_all ? static_cast<int64_t>(ids.size()) : in.count, longest);
    std::vector<int64_t> order;
    std::vector<Text> texts;
    {
        py::gil_scoped_release release;
        order = sorted(in);
        texts = distinct(in, order, min_shared);
        std::vector<Segment> segments;
        std::vector<int64_t> before;
        int64_t text = 0, next = 0;
        while (text < static_cast<int64_t>(texts.size())) {
            const int64_t kept = next;
            fill(texts, budgets, segments, before, text, next);
            out.add(in, order, texts, segments, kept, next);
        }
    }
    return py::make_tuple(array(out.input), array(out.start), array(out.stop), array(out.prefix_start),
                          array(out.cu_segments), array(out.pool), array(out.cu_pool), array(out.keep),
                          array(out.cu_keep), array(out.read), array(out.cu_read), array(out.read_index), array(order),
                          array(out.cu_inputs), static_cast<int64_t>(texts.size()));
}

}  // namespace

PYBIND11_MODULE(_planner, m) {
    m.doc() = "Compiled planner; call rmfast.engine.planner.plan.";
    m.def("plan", &plan);
}
