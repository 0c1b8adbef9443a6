// The two loops over neighbourhoods that torch cannot fuse: products compared with a radius while they are still in
// registers, and L1 distances between gathered rows.
//
// Products are float32 and add over the width from first to last, so that a cosine's bits depend on its two rows
// alone: not on blocks, threads, which of the two is the query, or the vector length VL, which the build sets. Where a
// product is within `band` of a radius, its rounding could decide, so the product is made again in double.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

typedef float vec __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef double wide __attribute__((vector_size(64)));
typedef std::int64_t n_t;

static const n_t PANEL = 2 * VL;     // base rows of a register tile
static const int QUERIES = 6;        // query rows of a register tile
static const n_t DEPTH = 256;        // width of a block: a panel of it fills half the first cache
static const n_t CHUNK = 512;        // base rows a thread takes at a time
static const n_t NEAR = 1 << 16;     // floats of queries that stay in the second cache

static inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
static inline n_t blocks(n_t n, n_t size) { return (n + size - 1) / size; }

// packed [panel][depth][PANEL] of rows [n, width], zeros beyond the last row
static void pack(float* packed, const float* rows, n_t n, n_t width) {
    for (n_t p = 0; p < n; p += PANEL, packed += width * PANEL) {
        const n_t here = std::min(PANEL, n - p);
        if (here < PANEL) std::memset(packed, 0, sizeof(float) * width * PANEL);
        for (n_t c = 0; c < width; c += 16) {
            const n_t end = std::min(width, c + 16);
            for (n_t o = 0; o < here; ++o)
                for (n_t k = c; k < end; ++k) packed[k * PANEL + o] = rows[(p + o) * width + k];
        }
    }
}

// out [M, PANEL] (+)= a [M, n] b [n, PANEL]; returns the largest of out
template <int M>
static inline float multiply(const float* a, n_t a_row, const float* b, n_t n, float* out, bool first) {
    vec acc[M][2] = {};
    if (!first)
        for (int m = 0; m < M; ++m) acc[m][0] = load(out + m * PANEL), acc[m][1] = load(out + m * PANEL + VL);
    for (n_t c = 0; c < n; ++c) {
        vec v0 = load(b + c * PANEL), v1 = load(b + c * PANEL + VL);
        for (int m = 0; m < M; ++m) {
            float s = a[m * a_row + c];
            acc[m][0] += s * v0, acc[m][1] += s * v1;
        }
    }
    vec top = acc[0][0];
    for (int m = 0; m < M; ++m)
        for (int h = 0; h < 2; ++h) {
            store(out + m * PANEL + h * VL, acc[m][h]);
            top = top > acc[m][h] ? top : acc[m][h];
        }
    float largest = top[0];
    for (int i = 1; i < VL; ++i) largest = std::max(largest, top[i]);
    return largest;
}

static float multiply_some(int m, const float* a, n_t a_row, const float* b, n_t n, float* out, bool first) {
    switch (m) {
        case 1:
            return multiply<1>(a, a_row, b, n, out, first);
        case 2:
            return multiply<2>(a, a_row, b, n, out, first);
        case 3:
            return multiply<3>(a, a_row, b, n, out, first);
        case 4:
            return multiply<4>(a, a_row, b, n, out, first);
        case 5:
            return multiply<5>(a, a_row, b, n, out, first);
        default:
            return multiply<6>(a, a_row, b, n, out, first);
    }
}

// The product of two rows, correctly rounded but for ties: products of floats are exact in double
static float exact_product(const float* a, const float* b, n_t width) {
    wide sum = {};
    n_t c = 0;
    for (; c + 8 <= width; c += 8)
        for (int i = 0; i < 8; ++i) sum[i] += double(a[c + i]) * double(b[c + i]);
    double total = ((sum[0] + sum[4]) + (sum[2] + sum[6])) + ((sum[1] + sum[5]) + (sum[3] + sum[7]));
    for (; c < width; ++c) total += double(a[c]) * double(b[c]);
    return float(total);
}

struct Hits {
    std::vector<std::int32_t> row, column;
    std::vector<float> cosine;
    void add(n_t i, n_t j, float value) { row.push_back(i), column.push_back(j), cosine.push_back(value); }
};

struct Found {
    std::vector<Hits> there, back;  // of each chunk of base rows: edges from queries, and to them
    std::vector<n_t> block;         // the block each chunk is in
};

struct Scan {
    const float *query, *base, *query_radius, *base_radius;
    const n_t* own;
    n_t n_query, width, first_query;
    float band;

    bool reaches(float* value, n_t i, n_t j, float radius) const {
        if (std::fabs(*value - radius) <= band) *value = exact_product(query + i * width, base + j * width, width);
        return *value >= radius;
    }

    // The pairs of one register tile, row by row; least: the smallest radius of these base rows, or beyond any
    void collect(const float* tile, n_t row, int n_rows, n_t column, n_t n_columns, float least, Hits* there,
                 Hits* back) const {
        for (n_t i = row; i < row + n_rows; ++i, tile += PANEL) {
            const float low = std::min(least, query_radius[i]) - band;
            unsigned inside = 0;
            for (n_t lane = 0; lane < PANEL; ++lane) inside |= unsigned(tile[lane] >= low) << lane;
            if (n_columns < PANEL) inside &= (1u << n_columns) - 1;
            for (; inside; inside &= inside - 1) {
                const n_t lane = __builtin_ctz(inside), j = column + lane;
                float first = tile[lane], second = first;
                if (own ? own[i] == j : first_query >= 0 && j <= first_query + i) continue;
                if (first >= query_radius[i] - band && reaches(&first, i, j, query_radius[i])) there->add(i, j, first);
                if (base_radius && second >= base_radius[j] - band && reaches(&second, i, j, base_radius[j]))
                    back->add(i, j, second);
            }
        }
    }

    // Queries against base rows start to stop; room holds the packed rows and the products of a panel
    void chunk(n_t start, n_t stop, float* room, Hits* there, Hits* back) const {
        const n_t some = std::max<n_t>(1, NEAR / width / QUERIES) * QUERIES;
        float* products = room + blocks(CHUNK, PANEL) * PANEL * width;
        pack(room, base + start * width, stop - start, width);
        for (n_t q = 0; q < n_query; q += some) {
            const n_t q_end = std::min(n_query, q + some);
            for (n_t p = start; p < stop; p += PANEL) {
                const n_t n_columns = std::min(PANEL, stop - p);
                if (first_query >= 0 && first_query + q >= p + n_columns - 1) continue;  // below the diagonal
                float least = base_radius ? *std::min_element(base_radius + p, base_radius + p + n_columns) : 2.0f;
                for (n_t c = 0; c < width; c += DEPTH) {
                    const n_t n = std::min(DEPTH, width - c);
                    const float* panel = room + (p - start) * width + c * PANEL;
                    for (n_t i = q; i < q_end; i += QUERIES) {
                        const int m = int(std::min<n_t>(QUERIES, q_end - i));
                        float* tile = products + (i - q) * PANEL;
                        const float top = multiply_some(m, query + i * width + c, width, panel, n, tile, c == 0);
                        if (c + n < width) continue;
                        const float low = std::min(least, *std::min_element(query_radius + i, query_radius + i + m));
                        if (top >= low - band) collect(tile, i, m, p, n_columns, least, there, back);
                    }
                }
            }
        }
    }
};

// Every pair with a product at or above a radius. own: each query's own base row or null; first_query: -1, or the base
// row that query 0 is, and then only base rows above a query's own are looked at. base_radius null: no edges back.
// counts [1 + blocks of base rows]: edges from the queries, then to the queries from each block. The columns of a row
// and the rows of a column come in rising order. Returns what bd_take and bd_drop need.
extern "C" void* bd_scan(const float* query, const float* base, const float* query_radius, const float* base_radius,
                         const n_t* own, n_t* counts, n_t n_query, n_t first_base, n_t n_base, n_t width,
                         n_t first_query, n_t block, n_t threads, double band) {
    const Scan scan{query, base, query_radius, base_radius, own, n_query, width, first_query, float(band)};
    const n_t per_block = blocks(block, CHUNK), n_blocks = blocks(n_base - first_base, block);
    const n_t some = std::max<n_t>(1, NEAR / width / QUERIES) * QUERIES;
    Found* found = new Found{std::vector<Hits>(n_blocks * per_block), std::vector<Hits>(n_blocks * per_block), {}};
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> room(blocks(CHUNK, PANEL) * PANEL * width + some * PANEL + 16);
        float* aligned = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(room.data()) + 63) / 64 * 64);
#pragma omp for schedule(dynamic)
        for (n_t task = 0; task < n_blocks * per_block; ++task) {
            const n_t left = first_base + task / per_block * block, right = std::min(n_base, left + block);
            const n_t start = left + task % per_block * CHUNK, stop = std::min(right, start + CHUNK);
            if (start < stop) scan.chunk(start, stop, aligned, &found->there[task], &found->back[task]);
        }
    }
    std::memset(counts, 0, sizeof(n_t) * (1 + n_blocks));
    for (n_t task = 0; task < n_blocks * per_block; ++task) {
        counts[0] += found->there[task].row.size();
        counts[1 + task / per_block] += found->back[task].row.size();
    }
    return found;
}

// Copies what bd_scan counted: first the edges from the queries, then those to them; frees it
extern "C" void bd_take(void* handle, std::int32_t* row, std::int32_t* column, float* cosine) {
    Found* found = static_cast<Found*>(handle);
    for (std::vector<Hits>* side : {&found->there, &found->back})
        for (Hits& hits : *side) {
            const n_t n = hits.row.size();
            std::copy(hits.row.begin(), hits.row.end(), row);
            std::copy(hits.column.begin(), hits.column.end(), column);
            std::copy(hits.cosine.begin(), hits.cosine.end(), cosine);
            row += n, column += n, cosine += n;
            hits = Hits();
        }
    delete found;
}

// neighbours and cosine in CSR order, by counting: place [rows] is where each row's next edge goes, and moves on
extern "C" void bd_place(const std::int32_t* row, const std::int32_t* column, const float* cosine, n_t n, n_t shift,
                         n_t* place, n_t* neighbours, float* placed) {
    for (n_t e = 0; e < n; ++e) {
        const n_t to = place[row[e]]++;
        neighbours[to] = column[e] + shift, placed[to] = cosine[e];
    }
}

// A product as it is after rounding: fused into a difference, equal rows would not come out equal
template <typename T>
static inline T rounded(T product) {
    asm("" : "+x"(product));
    return product;
}

// distance [E] = sum_c |a_ic s_i - b_jc t_j| for the edges (i, j) of anchors first to last, s and t one over the sums
extern "C" void bd_distance(const float* anchor, const float* base, const float* anchor_scale, const float* base_scale,
                            const n_t* offsets, const n_t* neighbours, float* distance, n_t n_anchors, n_t width,
                            n_t threads) {
    const n_t even = width / (4 * VL) * (4 * VL), edges = offsets[n_anchors] - offsets[0];
    const n_t share = std::max<n_t>(1, std::min<n_t>(4096, edges / (8 * threads)));
#pragma omp parallel num_threads(threads)
    {
        std::vector<float> scaled(width);
#pragma omp for schedule(dynamic)
        for (n_t part = 0; part < blocks(edges, share); ++part) {
            const n_t end = std::min(edges, (part + 1) * share) + offsets[0];
            n_t e = part * share + offsets[0];
            n_t i = std::upper_bound(offsets, offsets + n_anchors + 1, e) - offsets - 1;
            for (; e < end; ++i) {
                for (n_t c = 0; c < width; ++c) scaled[c] = anchor[i * width + c] * anchor_scale[i];
                for (const n_t stop = std::min(end, offsets[i + 1]); e < stop; ++e) {
                    const float *row = base + neighbours[e] * width, t = base_scale[neighbours[e]];
                    const float* next = base + neighbours[e + 1 < end ? e + 1 : e] * width;
                    vec sum[4] = {};
                    for (n_t c = 0; c < even; c += 4 * VL) {
                        for (n_t line = 0; line < 4 * VL; line += 16) __builtin_prefetch(next + c + line);
                        for (int h = 0; h < 4; ++h) {
                            vec gap = load(&scaled[c + h * VL]) - rounded<vec>(t * load(row + c + h * VL));
                            sum[h] += gap < 0 ? -gap : gap;
                        }
                    }
                    vec all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
                    float total = 0;
                    for (int h = 0; h < VL; ++h) total += all[h];
                    for (n_t c = even; c < width; ++c) total += std::fabs(scaled[c] - rounded(t * row[c]));
                    distance[e - offsets[0]] = total;
                }
            }
        }
    }
}
