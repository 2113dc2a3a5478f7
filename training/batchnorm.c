/* Training BatchNorm with the ReLU behind it, for maps [rows, channels] (channels last): each value is read twice and
 * written once, forward and backward. Compiled by batchnorm.py, for floats or, with -DBFLOAT16, for bfloat16.
 *
 *   y = relu(a x + b),  a = gamma / sqrt(var + eps),  b = beta - a mean;  without a ReLU: y = a x + b
 */
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
static inline number store(float value) { /* to the nearest, halves to even */
    uint32_t bits;
    memcpy(&bits, &value, 4);
    return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}
#else
typedef float number;
static inline float load(number x) { return x; }
static inline number store(float value) { return value; }
#endif

enum { ROWS = 64, MOST = 4096 }; /* floats sum so many rows, doubles their sums; channels */

/* For a block of rows at a time: both sums of a row's values are added up in floats, and then in doubles. */
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

/* mean and variance (of all rows, biased) of each channel; near `origin` no digits are lost. */
void statistics(const number *restrict x, long rows, long channels, const float *restrict origin,
                float *restrict mean, float *restrict var) {
    SUMS(load(x[i + c]) - origin[c], one)
    for (long c = 0; c < channels; c++) {
        double off = S[c] / rows, square = Q[c] / rows - off * off;
        mean[c] = origin[c] + off;
        var[c] = square < 0 ? 0 : square; /* a NaN stays one */
    }
}

void forward(const number *restrict x, number *restrict y, long rows, long channels, const float *restrict a,
             const float *restrict b, int relu) {
    float lowest = relu ? 0 : -__builtin_inff();
    for (long i = 0; i < rows * channels; i += channels)
        for (long c = 0; c < channels; c++) {
            float value = a[c] * load(x[i + c]) + b[c];
            y[i + c] = store(value < lowest ? lowest : value);
        }
}

/* What arrives at the normalised value: dy, but nothing where the ReLU cut it off. */
#define ARRIVES(i) (a[c] * load(x[i]) + b[c] <= lowest ? 0 : load(dy[i]))

/* sums over the rows of what arrives, and of its products with x - mean */
void gradient_sums(const number *restrict x, const number *restrict dy, long rows, long channels,
                   const float *restrict a, const float *restrict b, const float *restrict mean, int relu,
                   float *restrict sum, float *restrict product) {
    float lowest = relu ? 0 : -__builtin_inff();
    SUMS(ARRIVES(i + c), load(x[i + c]) - mean[c])
    for (long c = 0; c < channels; c++) sum[c] = S[c], product[c] = Q[c];
}

/* dx = a (what arrives) + k x + l */
void gradient(const number *restrict x, const number *restrict dy, number *restrict dx, long rows, long channels,
              const float *restrict a, const float *restrict b, const float *restrict k, const float *restrict l,
              int relu) {
    float lowest = relu ? 0 : -__builtin_inff();
    for (long i = 0; i < rows * channels; i += channels)
        for (long c = 0; c < channels; c++)
            dx[i + c] = store(a[c] * ARRIVES(i + c) + k[c] * load(x[i + c]) + l[c]);
}
