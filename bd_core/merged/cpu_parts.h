// What the CPU kernels are made of: vectors, elements in float32 or bfloat16, small products of panels.
// VL, floats in a vector, is set by the build.

#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

typedef float vec __attribute__((vector_size(4 * VL), aligned(4), may_alias));
typedef std::int64_t n_t;

static const n_t PANEL = 2 * VL;

static inline vec load(const float* p) { return *reinterpret_cast<const vec*>(p); }
static inline void store(float* p, vec v) { *reinterpret_cast<vec*>(p) = v; }
static inline n_t least(n_t a, n_t b) { return a < b ? a : b; }
static inline n_t blocks(n_t n, n_t size) { return (n + size - 1) / size; }

static const n_t LINE = 16;  // floats in a cache line

static inline float* aligned(std::vector<float>& room) {
    return reinterpret_cast<float*>((reinterpret_cast<std::uintptr_t>(room.data()) + 63) / 64 * 64);
}

static inline float sum(vec v) {
    float total = 0;
    for (int i = 0; i < VL; ++i) total += v[i];
    return total;
}

// bfloat16: the upper half of a float32
struct half_t {
    std::uint16_t bits;
};

typedef std::uint16_t narrow __attribute__((vector_size(2 * VL), aligned(2), may_alias));
typedef std::uint32_t wide __attribute__((vector_size(4 * VL)));
typedef std::uint16_t narrow_eight __attribute__((vector_size(16), aligned(2), may_alias));
typedef std::uint32_t wide_eight __attribute__((vector_size(32)));

static inline vec load(const half_t* p) {
    const narrow bits = *reinterpret_cast<const narrow*>(p);
    return reinterpret_cast<vec>(__builtin_convertvector(bits, wide) << 16);
}

static inline float number(float v) { return v; }
static inline float number(half_t v) {
    const std::uint32_t bits = static_cast<std::uint32_t>(v.bits) << 16;
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

static inline void copy(float* to, const float* from, n_t n) { std::memcpy(to, from, sizeof(float) * n); }
static inline void copy(float* to, const half_t* from, n_t n) {
    for (n_t i = 0; i < n; ++i) to[i] = number(from[i]);
}

typedef float eight __attribute__((vector_size(32), aligned(4), may_alias));

static inline eight load_eight(const float* p) { return *reinterpret_cast<const eight*>(p); }
static inline eight load_eight(const half_t* p) {
    const narrow_eight bits = *reinterpret_cast<const narrow_eight*>(p);
    return reinterpret_cast<eight>(__builtin_convertvector(bits, wide_eight) << 16);
}

#if defined(__clang__) || __GNUC__ >= 12
#define SHUFFLED(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
typedef int order __attribute__((vector_size(32)));
#define SHUFFLED(a, b, ...) __builtin_shuffle(a, b, order{__VA_ARGS__})
#endif

// to [8, 8] = from [8, 8]^T
template <class E>
static inline void transpose(float* to, n_t to_row, const E* from, n_t from_row) {
    eight r[8], s[8];
    for (int i = 0; i < 8; ++i) r[i] = load_eight(from + i * from_row);
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
// out_stride], zeros beyond the edge; one of the two strides is 1
template <class E>
static void pack(float* packed, const E* block, n_t depth_stride, n_t out_stride, n_t depth, n_t width) {
    if (out_stride == 1) {
        const n_t whole = width / PANEL * PANEL;
        if (whole < width) std::memset(packed + whole * depth, 0, sizeof(float) * depth * PANEL);
        for (n_t c = 0; c < depth; ++c, block += depth_stride) {
            float* to = packed + c * PANEL;
            for (n_t p = 0; p < whole; p += PANEL, to += depth * PANEL)
                store(to, load(block + p)), store(to + VL, load(block + p + VL));
            copy(to, block + whole, width - whole);
        }
        return;
    }
    for (n_t p = 0; p < width; p += PANEL, packed += depth * PANEL) {
        const n_t n = least(PANEL, width - p);
        const E* from = block + p * out_stride;
        if (n < PANEL) std::memset(packed, 0, sizeof(float) * depth * PANEL);
        const n_t by_eight_o = n / 8 * 8, by_eight_c = depth / 8 * 8;
        for (n_t o = 0; o < by_eight_o; o += 8)
            for (n_t c = 0; c < by_eight_c; c += 8)
                transpose(packed + c * PANEL + o, PANEL, from + c + o * out_stride, out_stride);
        for (n_t o = 0; o < n; ++o)
            for (n_t c = o < by_eight_o ? by_eight_c : 0; c < depth; ++c)
                packed[c * PANEL + o] = number(from[c + o * out_stride]);
    }
}

// a [T, depth] with rows `row` apart, or its copy with close rows: rows a multiple of 2 KiB apart share few cache
// sets
static const float* close_rows(const float* a, n_t* row, n_t T, n_t depth, float* room) {
    if (*row % 512) return a;
    for (n_t t = 0; t < T; ++t) copy(room + t * depth, a + t * *row, depth);
    *row = depth;
    return room;
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
