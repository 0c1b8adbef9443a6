// Per-sample linear maps on the CPU: a tile of merged weights is formed in cache and multiplied at once.
//
//     forward   y_b  = x_b W_b^T + bias_b,   W_b = W_0 + sum_k w_bk tau_k
//     backward  dx_b = dy_b W_b,             dw_bk = <dy_b^T x_b, tau_k>
//
// float32, all contiguous: x [B, T, I], y [B, T, O], w [B, K], bias [B, O], W_0 [O, I]; tau [K, O, I] in float32 or
// bfloat16 with contiguous matrices, `k_stride` elements from one expert to the next. A block of W_0 and tau is packed
// once for a group of samples, in the order the product reads it: [1 + K] [panel of outputs] [summed index] [PANEL],
// zeros beyond the edge; few samples take the way of cpu_few.h, with the same sums. A sample's y and dx depend neither on
// its batch nor on the number of threads, to the last bit; dw sums in an order of its own for few samples.

#include "cpu_few.h"
#include "cpu_parts.h"

static const n_t WIDTH = 4 * PANEL;  // outputs of a block
static const n_t DEPTH = 192;        // summed indices of a block
static const n_t MAX_GROUP = 64;     // samples that share a packed block

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

// y [T, width] += a [T, depth] tile; a last panel beyond the edge goes through `edge` [T, PANEL]
static void multiply(const float* a, n_t a_row, const float* tile, n_t depth, n_t width, float* y, n_t y_row, n_t T,
                     float* edge) {
    for (n_t p = 0; p < width; p += PANEL, tile += depth * PANEL) {
        const n_t n = least(PANEL, width - p);
        if (n == PANEL) {
            panel(a, a_row, 1, tile, PANEL, depth, y + p, y_row, T);
            continue;
        }
        for (n_t t = 0; t < T; ++t) copy(edge + t * PANEL, y + t * y_row + p, n);
        panel(a, a_row, 1, tile, PANEL, depth, edge, PANEL, T);
        for (n_t t = 0; t < T; ++t) copy(y + t * y_row + p, edge + t * PANEL, n);
    }
}

// dtile [n_panels, depth, PANEL] = dy [T, depth]^T x [T, width], in the order of a packed block
static void outer(const float* dy, n_t dy_row, const float* x, n_t x_row, n_t T, float* dtile, n_t depth, n_t width,
                  float* edge) {
    std::memset(dtile, 0, sizeof(float) * blocks(width, PANEL) * PANEL * depth);
    for (n_t p = 0; p < width; p += PANEL, dtile += depth * PANEL) {
        const n_t n = least(PANEL, width - p);
        if (n < PANEL) std::memset(edge, 0, sizeof(float) * T * PANEL);
        for (n_t t = 0; t < T; ++t) copy(edge + t * PANEL, x + t * x_row + p, n);
        panel(dy, 1, dy_row, edge, PANEL, T, dtile, PANEL, depth);
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
    Scratch(n_t K, n_t T) : room(WIDTH * DEPTH * (1 + K + 4) + T * (PANEL + DEPTH) + LINE) {
        packed = aligned(room);
        tile = packed + WIDTH * DEPTH * (1 + K), edge = tile + WIDTH * DEPTH * 4, near = edge + T * PANEL;
    }
};

template <class E>
static void forward(const float* x, const float* w, const float* base, const E* tau, const float* bias, float* y, n_t B,
                    n_t T, n_t I, n_t O, n_t K, n_t k_stride) {
    switch (B) {
        case 1:
            return few_forward<1>(x, w, base, tau, bias, y, T, I, O, K, k_stride);
        case 2:
            return few_forward<2>(x, w, base, tau, bias, y, T, I, O, K, k_stride);
        case 3:
            return few_forward<3>(x, w, base, tau, bias, y, T, I, O, K, k_stride);
        case FEW:
            return few_forward<FEW>(x, w, base, tau, bias, y, T, I, O, K, k_stride);
    }
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

template <class E>
static void backward(const float* x, const float* w, const float* base, const E* tau, const float* dy, float* dx,
                     float* parts, n_t B, n_t T, n_t I, n_t O, n_t K, n_t k_stride) {
    switch (B) {
        case 1:
            return few_backward<1>(x, w, base, tau, dy, dx, parts, T, I, O, K, k_stride);
        case 2:
            return few_backward<2>(x, w, base, tau, dy, dx, parts, T, I, O, K, k_stride);
        case 3:
            return few_backward<3>(x, w, base, tau, dy, dx, parts, T, I, O, K, k_stride);
        case FEW:
            return few_backward<FEW>(x, w, base, tau, dy, dx, parts, T, I, O, K, k_stride);
    }
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

extern "C" {

void bd_merged_forward(const float* x, const float* w, const float* base, const void* tau, const float* bias, float* y,
                       n_t B, n_t T, n_t I, n_t O, n_t K, n_t k_stride, n_t is_half) {
    if (is_half)
        forward(x, w, base, static_cast<const half_t*>(tau), bias, y, B, T, I, O, K, k_stride);
    else
        forward(x, w, base, static_cast<const float*>(tau), bias, y, B, T, I, O, K, k_stride);
}

// Blocks of columns, each of which leaves its own part of dw (few samples: wider ones, and fewer)
n_t bd_merged_parts(n_t I) { return blocks(I, WIDTH); }

// dx [B, T, I] or null; parts [blocks of columns, B, K] zeroed, to be summed by the caller, or null
void bd_merged_backward(const float* x, const float* w, const float* base, const void* tau, const float* dy, float* dx,
                        float* parts, n_t B, n_t T, n_t I, n_t O, n_t K, n_t k_stride, n_t is_half) {
    if (is_half)
        backward(x, w, base, static_cast<const half_t*>(tau), dy, dx, parts, B, T, I, O, K, k_stride);
    else
        backward(x, w, base, static_cast<const float*>(tau), dy, dx, parts, B, T, I, O, K, k_stride);
}
}
