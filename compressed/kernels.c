/* The functions in which training and evaluation on a CPU spend most time, apart from dense matrix products. Feature
 * maps are [rows, channels] (channels last). kernels.py compiles them for float or, with -DBFLOAT16, for bfloat16. */
#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef BFLOAT16
typedef uint16_t number;
static inline float load(number x) {
    uint32_t bits = (uint32_t)x << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
static inline number store(float value) { /* rounds to nearest, halves to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#else
typedef float number;
static inline float load(number x) { return x; }
static inline number store(float value) { return value; }
#endif

/* BatchNorm followed by h: an activation, and in fine-tuning the rounding before and after it. Forward and backward
 * each read every value twice and write it once.
 *
 *   y = h(z),  z = a x + b,  a = weight / sqrt(var + eps),  b = bias - a mean
 *   h(z) = z, or max(z, 0), or hard swish: 0 for z <= -3, z for z >= 3, z (z + 3) / 6 between;
 *          or z rounded to grid 0; or the hard swish of that, rounded to grid 1
 */

enum { NONE, RELU, HARDSWISH, ROUNDED, ROUNDED_HARDSWISH }; /* in the order of FUNCTIONS in training/cpu_kernels.py */

typedef struct { float step, low, high; } grid; /* step: a power of two; the smallest and the largest code */

/* Inlined and called with a constant h, so each call is compiled for one h, and no loop over values has a branch. */
#define FOR_ONE_FUNCTION static inline __attribute__((always_inline))

static inline float clip(float value, float low, float high) { /* a NaN stays a NaN */
    float raised = value < low ? low : value;
    return raised > high ? high : raised;
}
static inline float rounded(float z, grid g) { return clip(rintf(z * (1 / g.step)), g.low, g.high) * g.step; }

/* h(z); a NaN stays a NaN. */
FOR_ONE_FUNCTION float apply(long h, float z, const grid *g) {
    if (h == RELU) return z < 0 ? 0 : z;
    if (h == NONE) return z;
    if (h == ROUNDED) return rounded(z, g[0]);
    if (h == ROUNDED_HARDSWISH) z = rounded(z, g[0]);
    float between = z * (z * (1 / 6.0f) + 0.5f), above = z >= 3 ? z : between, y = z <= -3 ? 0 : above;
    return h == HARDSWISH ? y : rounded(y, g[1]);
}

/* The gradient of z from that of rounded(z, g). Adds that of the step: the rounding error of a value inside the range,
 * and the clipped code of one outside, in units of the step (see training/learned_steps.py). */
static inline float passed(float z, grid g, float dy, float *dstep) {
    float scaled = z * (1 / g.step), code = clip(rintf(scaled), g.low, g.high);
    float clipped = (scaled < g.low - 0.5f) | (scaled > g.high + 0.5f); /* 1 or 0 */
    *dstep += dy * (code - (clipped ? 0 : scaled));
    return clipped ? 0 : dy;
}

/* h'(z) dy, the gradient of z. Adds the gradients of both steps. */
FOR_ONE_FUNCTION float gradient(long h, float z, float dy, const grid *g, float *dstep, float *dstep2) {
    if (h == RELU) return z <= 0 ? 0 : dy;
    if (h == NONE) return dy;
    if (h == ROUNDED) return passed(z, g[0], dy, dstep);
    float v = z;
    if (h == ROUNDED_HARDSWISH) {
        v = rounded(z, g[0]);
        dy = passed(apply(HARDSWISH, v, g), g[1], dy, dstep2);
    }
    float between = (v * (1 / 3.0f) + 0.5f) * dy, above = v >= 3 ? dy : between, dv = v <= -3 ? 0 : above;
    return h == HARDSWISH ? dv : passed(z, g[0], dv, dstep);
}

/* Return dz; where it takes long to compute, keep it for the second pass as well, rounded to a number as dy is. */
FOR_ONE_FUNCTION float kept(long h, float dz, number *to) {
    if (h >= ROUNDED) *to = store(dz);
    return dz;
}

enum { ROWS = 64, MOST = 4096 }; /* rows summed in floats at a time; largest number of channels */

/* Sum `first`, and its product with `second`, over all rows, for each channel: in floats within a block of rows, and
 * in doubles over the blocks. */
#define SUMS(first, second)                                               \
    float s[MOST], q[MOST];                                               \
    double S[MOST], Q[MOST];                                              \
    for (long c = 0; c < channels; c++) S[c] = Q[c] = 0;                  \
    for (long start = 0; start < rows; start += ROWS) {                   \
        long end = start + ROWS < rows ? start + ROWS : rows;             \
        for (long c = 0; c < channels; c++) s[c] = q[c] = 0;              \
        for (long i = start * channels; i < end * channels; i += channels) \
            for (long c = 0; c < channels; c++) {                         \
                float one = (first);                                      \
                s[c] += one;                                              \
                q[c] += one * (second);                                   \
            }                                                             \
        for (long c = 0; c < channels; c++) S[c] += s[c], Q[c] += q[c];   \
    }

FOR_ONE_FUNCTION void outputs(long h, const number *restrict x, long rows, long channels, const float *restrict a,
                              const float *restrict b, const grid *g, number *restrict y) {
    grid both[2] = {g[0], g[1]}; /* known not to change */
    for (long i = 0; i < rows * channels; i += channels)
        for (long c = 0; c < channels; c++) y[i + c] = store(apply(h, a[c] * load(x[i + c]) + b[c], both));
}

/* Compute y and, for each channel, a, b, and the mean and (biased) variance over all rows, unless they are `frozen`:
 * then they are given. Sums are taken relative to `origin`, values near the means, so that no digits are lost. g: two
 * grids. */
void batchnorm(const number *restrict x, long rows, long channels, const float *restrict weight,
               const float *restrict bias, const float *restrict origin, float eps, long h, const grid *g, long frozen,
               number *restrict y, float *restrict mean, float *restrict var, float *restrict a, float *restrict b) {
    if (!frozen) {
        SUMS(load(x[i + c]) - origin[c], one)
        for (long c = 0; c < channels; c++) {
            double off = S[c] / rows, square = Q[c] / rows - off * off;
            mean[c] = origin[c] + off;
            var[c] = square < 0 ? 0 : square; /* a NaN stays one */
        }
    }
    for (long c = 0; c < channels; c++) {
        a[c] = weight[c] / sqrtf(var[c] + eps);
        b[c] = bias[c] - a[c] * mean[c];
    }
    if (h == NONE) outputs(NONE, x, rows, channels, a, b, g, y);
    if (h == RELU) outputs(RELU, x, rows, channels, a, b, g, y);
    if (h == HARDSWISH) outputs(HARDSWISH, x, rows, channels, a, b, g, y);
    if (h == ROUNDED) outputs(ROUNDED, x, rows, channels, a, b, g, y);
    if (h == ROUNDED_HARDSWISH) outputs(ROUNDED_HARDSWISH, x, rows, channels, a, b, g, y);
}

/* Compute dx, dweight, dbias, and the gradients of both steps, summed in floats over the rows of each channel. With n
 * rows, dbias the sum of dz over them, and p the sum of dz (x - mean):
 * dx = a (dz - dbias / n - (x - mean) p / (n (var + eps))) = a dz + k x + l; with frozen statistics, dx = a dz. */
#define DZ(i, of_step, of_step2) gradient(h, a[c] * load(x[i]) + b[c], load(dy[i]), both, of_step, of_step2)

FOR_ONE_FUNCTION void gradients(long h, const number *restrict x, long rows, long channels,
                                const float *restrict mean, const float *restrict var, const float *restrict a,
                                const float *restrict b, float eps, const grid *g, long frozen,
                                const number *restrict dy, number *restrict dx, float *restrict dweight,
                                float *restrict dbias, float *restrict dsteps) {
    float k[MOST], l[MOST], t[MOST], u[MOST];
    grid both[2] = {g[0], g[1]};
    for (long c = 0; c < channels; c++) t[c] = u[c] = 0;
    SUMS(kept(h, DZ(i + c, t + c, u + c), dx + i + c), load(x[i + c]) - mean[c])
    double of_step = 0, of_step2 = 0;
    for (long c = 0; c < channels; c++) {
        dweight[c] = Q[c] / sqrtf(var[c] + eps);
        dbias[c] = S[c];
        k[c] = frozen ? 0 : -a[c] * Q[c] / (rows * (var[c] + eps));
        l[c] = frozen ? 0 : -a[c] * S[c] / rows - k[c] * mean[c];
        of_step += t[c], of_step2 += u[c];
    }
    dsteps[0] = of_step, dsteps[1] = of_step2;
    for (long i = 0; i < rows * channels; i += channels)
        for (long c = 0; c < channels; c++) {
            float unused = 0, dz = h >= ROUNDED ? load(dx[i + c]) : DZ(i + c, &unused, &unused);
            dx[i + c] = store(a[c] * dz + k[c] * load(x[i + c]) + l[c]);
        }
}

void batchnorm_gradients(const number *restrict x, long rows, long channels, const float *restrict mean,
                         const float *restrict var, const float *restrict a, const float *restrict b, float eps,
                         long h, const grid *g, long frozen, const number *restrict dy, number *restrict dx,
                         float *restrict dweight, float *restrict dbias, float *restrict dsteps) {
#define CALL(h) gradients(h, x, rows, channels, mean, var, a, b, eps, g, frozen, dy, dx, dweight, dbias, dsteps)
    if (h == NONE) CALL(NONE);
    if (h == RELU) CALL(RELU);
    if (h == HARDSWISH) CALL(HARDSWISH);
    if (h == ROUNDED) CALL(ROUNDED);
    if (h == ROUNDED_HARDSWISH) CALL(ROUNDED_HARDSWISH);
}

/* 3x3 depthwise convolution with a zero border of one pixel. LANES channels of an image are unpacked into floats with
 * their border, a plane that fits into the first-level cache; each position is then a sum of nine products.
 */
#if defined BFLOAT16 && defined __AVX512F__
enum { LANES = 16 };
#else
enum { LANES = 8 };
#endif
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef uint32_t bits __attribute__((vector_size(4 * LANES)));
typedef number numbers __attribute__((vector_size(sizeof(number) * LANES)));

static inline vector unpack(const number *x) {
    numbers value;
    memcpy(&value, x, sizeof value);
#ifdef BFLOAT16
    return (vector)(__builtin_convertvector(value, bits) << 16);
#else
    return value;
#endif
}
static inline void pack(number *y, vector value) { /* as store does */
#ifdef BFLOAT16
    bits all = (bits)value;
    numbers packed = __builtin_convertvector((all + 0x7fff + ((all >> 16) & 1)) >> 16, numbers);
#else
    numbers packed = value;
#endif
    memcpy(y, &packed, sizeof packed);
}

/* Unpack x into the inside of a plane of width `across`, with `step` positions between its pixels. */
static void unpack_plane(const number *restrict x, long height, long width, long channels, long step,
                         vector *restrict plane, long across) {
    for (long i = 0; i < height; i++)
        for (long j = 0; j < width; j++)
            plane[(1 + i * step) * across + 1 + j * step] = unpack(x + (i * width + j) * channels);
}

/* y [height, width] = sum of w [3, 3] times the neighbourhood of every stride-th position of the plane */
static void correlate(const vector *restrict plane, long across, const vector *restrict w, long stride,
                      number *restrict y, long height, long width, long channels) {
    for (long i = 0; i < height; i++)
        for (long j = 0; j < width; j++) {
            const vector *p = plane + i * stride * across + j * stride, *q = p + across, *r = q + across;
            pack(y + (i * width + j) * channels, (p[0] * w[0] + p[1] * w[1] + p[2] * w[2])
                                               + (q[0] * w[3] + q[1] * w[4] + q[2] * w[5])
                                               + (r[0] * w[6] + r[1] * w[7] + r[2] * w[8]));
        }
}

/* Loop over the channels, LANES at a time. The last block ends at the last channel and may overlap the one before. */
#define BLOCKS(c) \
    for (long done = 0, c = 0; done < channels; done = c + LANES, c = done + LANES < channels ? done : channels - LANES)

/* x [images, height, width, channels], weight [3, 3, channels], y [images, ceil(height / stride), ...]; LANES channels
 * or more */
void depthwise(const number *restrict x, long images, long height, long width, long channels,
               const float *restrict weight, long stride, number *restrict y) {
    long h = (height - 1) / stride + 1, v = (width - 1) / stride + 1, across = width + 2;
    vector plane[(height + 2) * across], w[9];
    memset(plane, 0, sizeof plane);
    for (long n = 0; n < images; n++, x += height * width * channels, y += h * v * channels)
        BLOCKS(c) {
            for (int k = 0; k < 9; k++) memcpy(w + k, weight + k * channels + c, sizeof *w);
            unpack_plane(x + c, height, width, channels, 1, plane, across);
            correlate(plane, across, w, stride, y + c, h, v, channels);
        }
}

/* Compute dx, and add to dweight. For dx, dy is spread by the stride and correlated with the weights rotated by 180
 * degrees. */
void depthwise_gradients(const number *restrict x, long images, long height, long width, long channels,
                         const float *restrict weight, long stride, const number *restrict dy, number *restrict dx,
                         float *restrict dweight) {
    long h = (height - 1) / stride + 1, v = (width - 1) / stride + 1, across = width + 2;
    vector plane[(height + 2) * across], arrives[(height + 2) * across], w[9];
    memset(plane, 0, sizeof plane);
    memset(arrives, 0, sizeof arrives);
    for (long n = 0; n < images; n++, x += height * width * channels, dx += height * width * channels,
              dy += h * v * channels)
        BLOCKS(c) {
            for (int k = 0; k < 9; k++) memcpy(w + k, weight + (8 - k) * channels + c, sizeof *w);
            unpack_plane(x + c, height, width, channels, 1, plane, across);
            unpack_plane(dy + c, h, v, channels, stride, arrives, across);
            correlate(arrives, across, w, 1, dx + c, height, width, channels);
            vector s0 = {0}, s1 = {0}, s2 = {0}, s3 = {0}, s4 = {0}, s5 = {0}, s6 = {0}, s7 = {0}, s8 = {0};
            for (long i = 0; i < height; i += stride)
                for (long j = 0; j < width; j += stride) {
                    const vector *p = plane + i * across + j, *q = p + across, *r = q + across;
                    vector d = arrives[(1 + i) * across + 1 + j];
                    s0 += d * p[0], s1 += d * p[1], s2 += d * p[2];
                    s3 += d * q[0], s4 += d * q[1], s5 += d * q[2];
                    s6 += d * r[0], s7 += d * r[1], s8 += d * r[2];
                }
            vector s[9] = {s0, s1, s2, s3, s4, s5, s6, s7, s8};
            for (int k = 0; k < 9; k++)
                for (long lane = done - c; lane < LANES; lane++) dweight[k * channels + c + lane] += s[k][lane];
        }
}

/* The rounding of exact_network.py after a convolution, in one pass instead of eight, with the same bits as a result.
 *
 * y = code * step, where code is x / step, rounded (halves to even) and clipped. step: a power of two. */
void quantize(const float *restrict x, long count, float step, float low, float high, float *restrict y) {
    grid g = {step, low, high};
    for (long i = 0; i < count; i++) y[i] = rounded(x[i], g);
}

/* y = values[code - lowest], where code is x / step: of `count` values x on this grid, which the `entries` values cover.
 * A NaN stays one. */
void look_up(const float *restrict x, long count, float step, long lowest, const float *restrict values, long entries,
             float *restrict y) {
    float inverse = 1 / step;
    for (long i = 0; i < count; i++) {
        float place = x[i] * inverse - lowest;
        long k = place > 0 ? place < entries ? (long)place : entries - 1 : 0;
        y[i] = x[i] == x[i] ? values[k] : x[i];
    }
}

/* As `quantize`, for scale x + shift, computed in doubles. */
void rescale(const float *restrict x, long rows, long channels, const double *restrict scale,
             const double *restrict shift, float step, float low, float high, float *restrict y) {
    double inverse = 1 / step;
    for (long i = 0; i < rows * channels; i += channels)
        for (long c = 0; c < channels; c++) {
            double code = rint((x[i + c] * scale[c] + shift[c]) * inverse);
            y[i + c] = (float)(code < low ? low : code > high ? high : code) * step;
        }
}
