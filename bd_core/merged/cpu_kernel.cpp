// Per-sample linear maps on the CPU: a tile of merged weights is formed in cache and multiplied at once.
//
//     forward   y_b  = x_b W_b^T + bias_b,   W_b = W_0 + sum_k w_bk tau_k
//     backward  dx_b = dy_b W_b,             dw_bk = <dy_b^T x_b, tau_k>
//
// float32, all contiguous: x [B, T, I], y [B, T, O], w [B, K], bias [B, O], W_0 [O, I]; tau [K, O, I] with contiguous
// matrices, `k_stride` elements from one expert to the next. A block of W_0 and tau is packed once for a group of
// samples, in the order the product reads it: [1 + K] [panel of outputs] [summed index] [PANEL], zeros beyond the
// edge. A sample's result depends neither on its batch nor on the number of threads. VL, floats in a vector, is set
// by the build.

#include <cstdint>
#include <cstring>
#include <vector>

typedef float vec __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef std::int64_t n_t;

static const n_t PANEL = 2 * VL;
static const n_t WIDTH = 4 * PANEL;  // outputs of a block
static const n_t DEPTH = 192;        // summed indices of a block
static const n_t MAX_GROUP = 64;     // samples that share a packed block

static inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
static inline n_t least(n_t a, n_t b) { return a < b ? a : b; }
static inline n_t blocks(n_t n, n_t size) { return (n + size - 1) / size; }

static inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < VL; ++i) total += v[i];
    return total;
}

typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int order __attribute__((vector_size(32)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, order{__VA_ARGS__})
#endif

// to [8, 8] = from [8, 8]^T
static inline void transpose(float* to, n_t to_row, const float* from, n_t from_row) {
    eight r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = *reinterpret_cast<const eight*>(from + i * from_row);
    for (int i = 0; i < 8; i += 2) {
        s[i] = SHUFFLED(r[i], r[i + 1], 0, 8, 2, 10, 4, 12, 6, 14);
        s[i + 1] = SHUFFLED(r[i], r[i + 1], 1, 9, 3, 11, 5, 13, 7, 15);
    }
    for (int h = 0; h < 8; h += 4)
        for (int i = 0; i < 2; ++i) {
            r[h + i] = SHUFFLED(s[h + i], s[h + i + 2], 0, 1, 8, 9, 4, 5, 12, 13);
            r[h + i + 2] = SHUFFLED(s[h + i], s[h + i + 2], 2, 3, 10, 11, 6, 7, 14, 15);
        }
    for (int i = 0; i < 4; ++i) {
        *reinterpret_cast<eight*>(to + i * to_row) = SHUFFLED(r[i], r[i + 4], 0, 1, 2, 3, 8, 9, 10, 11);
        *reinterpret_cast<eight*>(to + (i + 4) * to_row) = SHUFFLED(r[i], r[i + 4], 4, 5, 6, 7, 12, 13, 14, 15);
    }
}

// packed [n_panels, depth, PANEL] = block [depth, width] of a matrix, element (c, o) at [c * depth_stride + o *
// out_stride]; one of the two strides is 1
static void pack(float* packed, const float* block, n_t depth_stride, n_t out_stride, n_t depth, n_t width) {
    for (n_t p = 0; p < width; p += PANEL, packed += depth * PANEL) {
        const n_t n = least(PANEL, width - p);
        const float* from = block + p * out_stride;
        if (n < PANEL) std::memset(packed, 0, sizeof(float) * depth * PANEL);
        if (out_stride == 1) {
            for (n_t c = 0; c < depth; ++c)
                std::memcpy(packed + c * PANEL, from + c * depth_stride, sizeof(float) * n);
            continue;
        }
        const n_t by_eight_o = n / 8 * 8, by_eight_c = depth / 8 * 8;
        for (n_t o = 0; o < by_eight_o; o += 8)
            for (n_t c = 0; c < by_eight_c; c += 8)
                transpose(packed + c * PANEL + o, PANEL, from + c + o * out_stride, out_stride);
        for (n_t o = 0; o < n; ++o)
            for (n_t c = o < by_eight_o ? by_eight_c : 0; c < depth; ++c)
                packed[c * PANEL + o] = from[c + o * out_stride];
    }
}

// a [T, depth] with rows `row` apart, or its copy with close rows: rows a multiple of 2 KiB apart share few cache
// sets
static const float* close_rows(const float* a, n_t* row, n_t T, n_t depth, float* copy) {
    if (*row % 512) return a;
    for (n_t t = 0; t < T; ++t) std::memcpy(copy + t * depth, a + t * *row, sizeof(float) * depth);
    *row = depth;
    return copy;
}

// Q tiles of `size` floats, W_0 + sum_k w_qk tau_k; Q samples share each read of the packed block
template <int Q>
static void form(float* tile, const float* packed, const float* w, n_t K, n_t size) {
    for (n_t i = 0; i < size; i += PANEL) {
        vec acc[Q][2];
        for (int q = 0; q < Q; ++q) acc[q][0] = load(packed + i), acc[q][1] = load(packed + i + VL);
        for (n_t k = 0; k < K; ++k) {
            const float* tau = packed + (k + 1) * size + i;
            vec v0 = load(tau), v1 = load(tau + VL);
            for (int q = 0; q < Q; ++q) acc[q][0] += w[q * K + k] * v0, acc[q][1] += w[q * K + k] * v1;
        }
        for (int q = 0; q < Q; ++q) store(tile + q * size + i, acc[q][0]), store(tile + q * size + i + VL, acc[q][1]);
    }
}

// out [M, PANEL] += a [M, n] b [n, PANEL]; element (m, c) of a at [m * a_row + c * a_col]
template <int M>
static inline void rows(const float* a, n_t a_row, n_t a_col, const float* b, n_t b_stride, n_t n, float* out,
                        n_t out_stride) {
    vec acc[M][2];
    for (int m = 0; m < M; ++m) acc[m][0] = load(out + m * out_stride), acc[m][1] = load(out + m * out_stride + VL);
    for (n_t c = 0; c < n; ++c) {
        vec v0 = load(b + c * b_stride), v1 = load(b + c * b_stride + VL);
        for (int m = 0; m < M; ++m) {
            float s = a[m * a_row + c * a_col];
            acc[m][0] += s * v0, acc[m][1] += s * v1;
        }
    }
    for (int m = 0; m < M; ++m) store(out + m * out_stride, acc[m][0]), store(out + m * out_stride + VL, acc[m][1]);
}

// out [n_rows, PANEL] += a [n_rows, n] b [n, PANEL]
static void panel(const float* a, n_t a_row, n_t a_col, const float* b, n_t b_stride, n_t n, float* out,
                  n_t out_stride, n_t n_rows) {
    n_t m = 0;
    for (; m + 6 <= n_rows; m += 6)
        rows<6>(a + m * a_row, a_row, a_col, b, b_stride, n, out + m * out_stride, out_stride);
    a += m * a_row, out += m * out_stride;
    switch (n_rows - m) {
        case 5:
            rows<5>(a, a_row, a_col, b, b_stride, n, out, out_stride);
            break;
        case 4:
            rows<4>(a, a_row, a_col, b, b_stride, n, out, out_stride);
            break;
        case 3:
            rows<3>(a, a_row, a_col, b, b_stride, n, out, out_stride);
            break;
        case 2:
            rows<2>(a, a_row, a_col, b, b_stride, n, out, out_stride);
            break;
        case 1:
            rows<1>(a, a_row, a_col, b, b_stride, n, out, out_stride);
            break;
    }
}

// y [T, width] += a [T, depth] tile; a last panel beyond the edge goes through `edge` [T, PANEL]
static void multiply(const float* a, n_t a_row, const float* tile, n_t depth, n_t width, float* y, n_t y_row, n_t T,
                     float* edge) {
    for (n_t p = 0; p < width; p += PANEL, tile += depth * PANEL) {
        const n_t n = least(PANEL, width - p);
        if (n == PANEL) {
            panel(a, a_row, 1, tile, PANEL, depth, y + p, y_row, T);
            continue;
        }
        std::memset(edge, 0, sizeof(float) * T * PANEL);
        panel(a, a_row, 1, tile, PANEL, depth, edge, PANEL, T);
        for (n_t t = 0; t < T; ++t)
            for (n_t i = 0; i < n; ++i) y[t * y_row + p + i] += edge[t * PANEL + i];
    }
}

// dtile [n_panels, depth, PANEL] = dy [T, depth]^T x [T, width], in the order of a packed block
static void outer(const float* dy, n_t dy_row, const float* x, n_t x_row, n_t T, float* dtile, n_t depth, n_t width,
                  float* edge) {
    std::memset(dtile, 0, sizeof(float) * blocks(width, PANEL) * PANEL * depth);
    for (n_t p = 0; p < width; p += PANEL, dtile += depth * PANEL) {
        const n_t n = least(PANEL, width - p);
        const float* b = x + p;
        if (n < PANEL) {
            std::memset(edge, 0, sizeof(float) * T * PANEL);
            for (n_t t = 0; t < T; ++t) std::memcpy(edge + t * PANEL, x + t * x_row + p, sizeof(float) * n);
            b = edge;
        }
        panel(dy, 1, dy_row, b, n < PANEL ? PANEL : x_row, T, dtile, PANEL, depth);
    }
}

// dw [Q, K] += <dtile_q, tau_k>, a stretch of L1 size at a time
template <int Q>
static void contract(const float* dtile, const float* packed, n_t K, n_t size, float* dw) {
    const n_t stretch = 16 * PANEL;
    for (n_t i = 0; i < size; i += stretch) {
        const n_t end = least(size, i + stretch);
        for (n_t k = 0; k < K; ++k) {
            const float* tau = packed + (k + 1) * size;
            vec acc[Q][2] = {};
            for (n_t j = i; j < end; j += PANEL) {
                vec v0 = load(tau + j), v1 = load(tau + j + VL);
                for (int q = 0; q < Q; ++q)
                    acc[q][0] += v0 * load(dtile + q * size + j), acc[q][1] += v1 * load(dtile + q * size + j + VL);
            }
            for (int q = 0; q < Q; ++q) dw[q * K + k] += sum(acc[q][0] + acc[q][1]);
        }
    }
}

struct Scratch {
    std::vector<float> room;
    float *packed, *tile, *edge, *near;
    Scratch(n_t K, n_t T) : room(WIDTH * DEPTH * (1 + K + 4) + T * (PANEL + DEPTH) + 64) {
        packed = reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(room.data()) + 63) / 64 * 64);
        tile = packed + WIDTH * DEPTH * (1 + K), edge = tile + WIDTH * DEPTH * 4, near = edge + T * PANEL;
    }
};

extern "C" void bd_forward(const float* x, const float* w, const float* base, const float* tau, const float* bias,
                           float* y, n_t B, n_t T, n_t I, n_t O, n_t K, n_t k_stride) {
    const n_t group = least(B, MAX_GROUP), n_groups = blocks(B, group), depth = blocks(I, blocks(I, DEPTH));
#pragma omp parallel
    {
        Scratch own(K, T);
#pragma omp for schedule(dynamic)
        for (n_t task = 0; task < blocks(O, WIDTH) * n_groups; ++task) {
            const n_t o = task / n_groups * WIDTH, width = least(WIDTH, O - o);
            const n_t first = task % n_groups * group, last = least(B, first + group);
            for (n_t b = first; b < last; ++b)
                for (n_t t = 0; t < T; ++t)
                    if (bias)
                        std::memcpy(y + (b * T + t) * O + o, bias + b * O + o, sizeof(float) * width);
                    else
                        std::memset(y + (b * T + t) * O + o, 0, sizeof(float) * width);
            for (n_t i = 0; i < I; i += depth) {
                const n_t n = least(depth, I - i), size = blocks(width, PANEL) * PANEL * n;
                pack(own.packed, base + o * I + i, 1, I, n, width);
                for (n_t k = 0; k < K; ++k)
                    pack(own.packed + (k + 1) * size, tau + k * k_stride + o * I + i, 1, I, n, width);
                n_t q;
                for (n_t b = first; b < last; b += q) {
                    q = last - b >= 4 ? 4 : 1;
                    if (q == 4)
                        form<4>(own.tile, own.packed, w + b * K, K, size);
                    else
                        form<1>(own.tile, own.packed, w + b * K, K, size);
                    for (n_t s = 0; s < q; ++s) {
                        n_t row = I;
                        const float* near = close_rows(x + (b + s) * T * I + i, &row, T, n, own.near);
                        multiply(near, row, own.tile + s * size, n, width, y + (b + s) * T * O + o, O, T, own.edge);
                    }
                }
            }
        }
    }
}

// Blocks of columns, each of which leaves its own part of dw
extern "C" n_t bd_backward_parts(n_t I) { return blocks(I, WIDTH); }

// dx [B, T, I] or null; parts [blocks of columns, B, K] zeroed, to be summed by the caller, or null
extern "C" void bd_backward(const float* x, const float* w, const float* base, const float* tau, const float* dy,
                            float* dx, float* parts, n_t B, n_t T, n_t I, n_t O, n_t K, n_t k_stride) {
    const n_t group = least(B, MAX_GROUP), n_groups = blocks(B, group), depth = blocks(O, blocks(O, DEPTH));
#pragma omp parallel
    {
        Scratch own(K, T);
#pragma omp for schedule(dynamic)
        for (n_t task = 0; task < blocks(I, WIDTH) * n_groups; ++task) {
            const n_t i = task / n_groups * WIDTH, width = least(WIDTH, I - i);
            const n_t first = task % n_groups * group, last = least(B, first + group);
            if (dx)
                for (n_t bt = first * T; bt < last * T; ++bt) std::memset(dx + bt * I + i, 0, sizeof(float) * width);
            for (n_t o = 0; o < O; o += depth) {
                const n_t n = least(depth, O - o), size = blocks(width, PANEL) * PANEL * n;
                pack(own.packed, base + o * I + i, I, 1, n, width);
                for (n_t k = 0; k < K; ++k)
                    pack(own.packed + (k + 1) * size, tau + k * k_stride + o * I + i, I, 1, n, width);
                n_t q;
                for (n_t b = first; b < last; b += q) {
                    q = last - b >= 4 ? 4 : 1;
                    if (dx) {
                        if (q == 4)
                            form<4>(own.tile, own.packed, w + b * K, K, size);
                        else
                            form<1>(own.tile, own.packed, w + b * K, K, size);
                        for (n_t s = 0; s < q; ++s) {
                            n_t row = O;
                            const float* near = close_rows(dy + (b + s) * T * O + o, &row, T, n, own.near);
                            multiply(near, row, own.tile + s * size, n, width, dx + (b + s) * T * I + i, I, T,
                                     own.edge);
                        }
                    }
                    if (parts) {
                        for (n_t s = 0; s < q; ++s) {
                            n_t row = O;
                            const float* near = close_rows(dy + (b + s) * T * O + o, &row, T, n, own.near);
                            outer(near, row, x + (b + s) * T * I + i, I, T, own.tile + s * size, n, width, own.edge);
                        }
                        float* dw = parts + (i / WIDTH * B + b) * K;
                        if (q == 4)
                            contract<4>(own.tile, own.packed, K, size, dw);
                        else
                            contract<1>(own.tile, own.packed, K, size, dw);
                    }
                }
            }
        }
    }
}
