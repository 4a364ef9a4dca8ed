// Passes over rows of scores on a CPU: noise, the best codes of a row, its log-sum-exp, softmax and its backward. Each
// reads and writes a row while it lies in the caches, where PyTorch takes up to a dozen passes over a whole tile.
//
// Bits depend neither on the number of threads nor, but for the sums of a softmax, on the width of vectors: logarithms
// and exponentials are written out in operations that every processor rounds alike (compile with -ffp-contract=off).
// The loops are plain, for the compiler to vectorize; a condition that could split one into two paths would prevent it.

#include <math.h>
#include <stdint.h>
#include <string.h>

#if defined(__x86_64__)
#define EVERY_VECTOR_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_VECTOR_WIDTH
#endif
#define INLINE static inline __attribute__((always_inline))

enum { BLOCK = 256 };
#define LN2_HIGH 0.693145751953125f  // few bits, so that whole multiples are exact
#define LN2_LOW 1.4286068203e-6f

INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

INLINE float as_float(int32_t bits)
{
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

INLINE int32_t as_bits(float value)
{
    int32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

// Logarithm of a positive normal number, within 1 ulp: x = 2^k (1 + f) with 1 + f between sqrt(1/2) and sqrt(2), and
// log(1 + f) = 2 atanh(s) = 2 s + s rest(s^2) with s = f / (2 + f), where 2 s = f - s f.
INLINE float logarithm(float x)
{
    int32_t bits = as_bits(x) - 0x3f3504f3;  // sqrt(1/2)
    float k = (float)(bits >> 23), f = as_float((bits & 0x7fffff) + 0x3f3504f3) - 1;
    float s = f / (2 + f), z = s * s;
    float rest = z * (2 / 3.0f + z * (2 / 5.0f + z * (2 / 7.0f + z * (2 / 9.0f))));
    return k * LN2_HIGH + (f + (k * LN2_LOW - s * (f - rest)));
}

// Exponential of a number from -87 to 0, within 2 ulp: x = k log(2) + r, |r| <= log(2) / 2, and Taylor's series of r.
INLINE float exponential(float x)
{
    float shifted = x * 1.44269504f + 0x1.8p23f;  // rounds to a whole number, which the low bits hold
    float k = shifted - 0x1.8p23f, r = x - k * LN2_HIGH - k * LN2_LOW;
    float tail = 1 / 6.0f + r * (1 / 24.0f + r * (1 / 120.0f + r * (1 / 720.0f + r * (1 / 5040.0f))));
    float scale = as_float((as_bits(shifted) << 23) + 0x3f800000);
    return scale + scale * (r + r * r * (0.5f + r * tail));
}

// Gumbel noise of a 32-bit word, as gumbel_from_words in regvq_fast/ops/noise.py, to the bit.
INLINE float gumbel(uint32_t word)
{
    // Halves of a word are exact as floats, and signed integers convert in every vector width.
    float v = ((float)(int32_t)(word >> 16) * 65536.0f + (float)(int32_t)(word & 0xffff) + 0.5f) * 0x1p-32f;
    float u = 1 - v, lost = (1 - u) - v;
    u += (float)(u == 0) * 0x1p-24f;
    return -logarithm(-(logarithm(u) + lost * (1 + v)));
}

// Noise of BLOCK codes of a row; regvq_fast/ops/noise.py documents the counters.
INLINE void gumbel_block(uint64_t seed, uint64_t row, uint32_t first_counter, float *restrict out)
{
    enum { CALLS = BLOCK / 4 };
    uint32_t c0[CALLS], c1[CALLS], c2[CALLS], c3[CALLS], words[BLOCK];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int j = 0; j < CALLS; j++) {
        c0[j] = first_counter + (uint32_t)j;
        c1[j] = (uint32_t)(row >> 32);
        c2[j] = (uint32_t)row;
        c3[j] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int j = 0; j < CALLS; j++) {
            uint64_t product_0 = (uint64_t)c0[j] * 0xD2511F53u, product_1 = (uint64_t)c2[j] * 0xCD9E8D57u;
            c0[j] = (uint32_t)(product_1 >> 32) ^ c1[j] ^ k0;
            c2[j] = (uint32_t)(product_0 >> 32) ^ c3[j] ^ k1;
            c1[j] = (uint32_t)product_1;
            c3[j] = (uint32_t)product_0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < CALLS; j++) {
        words[4 * j] = c0[j];
        words[4 * j + 1] = c1[j];
        words[4 * j + 2] = c2[j];
        words[4 * j + 3] = c3[j];
    }
    for (int j = 0; j < BLOCK; j++) out[j] = gumbel(words[j]);
}

INLINE float maximum(const float *s, int64_t n)
{
    float top = -INFINITY;
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < n; j++) top = s[j] > top ? s[j] : top;
    return top;
}

// The first of the largest: find its block, then the code in it.
INLINE int64_t argmax(const float *s, int64_t n)
{
    float best = -INFINITY;
    int64_t first = 0;
    for (int64_t i = 0; i < n; i += BLOCK) {
        float top = maximum(s + i, least(BLOCK, n - i));
        if (top > best) {
            best = top;
            first = i;
        }
    }
    for (int64_t i = first; i < n; i++)
        if (s[i] == best) return i;
    return 0;  // all are nan or -inf
}

// --------------------------------------------------------------------------------------------------------- passes

typedef struct {
    int64_t num_codes, seed, head;
    const int64_t *rows;     // numbers of the rows for their noise; NULL: no noise
    const float *t, *bias;   // temperature of each row; bias of each code or NULL
    float *scores;           // (num_rows, num_codes)
    int64_t *best, *selected;
    const float *column_bias;      // (groups, num_codes), added to grad; or NULL
    const int64_t *group;          // group of each row, negative: none
    float *p, *grad;               // (num_rows, num_codes)
    float *lse;                    // log-sum-exp of each row
    const float *factor;           // factor of each row
} Pass;

INLINE uint32_t first_counter(const Pass *a, int64_t code)
{
    return (uint32_t)(a->head * ((a->num_codes + 3) / 4) + code / 4);  // each head's codes begin a new counter
}

EVERY_VECTOR_WIDTH void regvq_noise_rows(const Pass *a, int64_t begin, int64_t end)
{
    for (int64_t m = begin; m < end; m++)
        for (int64_t i = 0; i < a->num_codes; i += BLOCK) {
            float noise[BLOCK];
            gumbel_block((uint64_t)a->seed, (uint64_t)a->rows[m], first_counter(a, i), noise);
            memcpy(a->scores + m * a->num_codes + i, noise, sizeof(float) * least(BLOCK, a->num_codes - i));
        }
}

EVERY_VECTOR_WIDTH void regvq_select_rows(const Pass *a, int64_t begin, int64_t end)
{
    int64_t n = a->num_codes;
    for (int64_t m = begin; m < end; m++) {
        float *s = a->scores + m * n;
        for (int64_t i = 0; a->bias && i < n; i++) s[i] += a->bias[i];
        a->best[m] = argmax(s, n);
        if (!a->rows) continue;
        for (int64_t i = 0; i < n; i += BLOCK) {
            float noise[BLOCK];
            gumbel_block((uint64_t)a->seed, (uint64_t)a->rows[m], first_counter(a, i), noise);
            for (int64_t j = 0; j < least(BLOCK, n - i); j++) s[i + j] += noise[j];
        }
        a->selected[m] = argmax(s, n);
        for (int64_t i = 0; i < n; i++) s[i] /= a->t[m];
    }
}

// p = softmax(scores), with those under 1e-26 as 0, and grad = p (grad + column_bias - their mean under p).
EVERY_VECTOR_WIDTH void regvq_softmax_backward_rows(const Pass *a, int64_t begin, int64_t end)
{
    int64_t n = a->num_codes;
    for (int64_t m = begin; m < end; m++) {
        const float *s = a->scores + m * n;
        const float *column_bias = a->column_bias && a->group[m] >= 0 ? a->column_bias + a->group[m] * n : NULL;
        float *p = a->p + m * n, *grad = a->grad + m * n;
        for (int64_t i = 0; column_bias && i < n; i++) grad[i] += column_bias[i];
        float top = maximum(s, n);
        double sum = 0, dot = 0;
        for (int64_t i = 0; i < n; i += BLOCK) {
            int64_t size = least(BLOCK, n - i);
            float block_sum = 0, block_dot = 0;
#pragma omp simd  // p may be s
            for (int64_t j = i; j < i + size; j++) {
                float x = s[j] - top;
                p[j] = x > -60 ? x : -60;  // e^-60 < 1e-26
            }
#pragma omp simd reduction(+ : block_sum, block_dot)
            for (int64_t j = i; j < i + size; j++) {
                float e = exponential(p[j]);
                p[j] = e;
                block_sum += e;
                block_dot += e * grad[j];
            }
            sum += block_sum;
            dot += block_dot;
        }
        float factor = (float)(1 / sum), mean = (float)(dot / sum);
        for (int64_t i = 0; i < n; i++) {
            float probability = p[i] * factor;
            p[i] = probability > 1e-26f ? probability : 0;
            grad[i] = p[i] * (grad[i] - mean);
        }
    }
}

EVERY_VECTOR_WIDTH void regvq_log_sum_exp_rows(const Pass *a, int64_t begin, int64_t end)
{
    int64_t n = a->num_codes;
    for (int64_t m = begin; m < end; m++) {
        const float *s = a->scores + m * n;
        float top = maximum(s, n);
        double sum = 0;
        for (int64_t i = 0; i < n; i += BLOCK) {
            int64_t size = least(BLOCK, n - i);
            float x[BLOCK], block_sum = 0;
            for (int64_t j = 0; j < size; j++) {
                float below = s[i + j] - top;
                x[j] = below > -87 ? below : -87;
            }
#pragma omp simd reduction(+ : block_sum)
            for (int64_t j = 0; j < size; j++) block_sum += exponential(x[j]);
            sum += block_sum;
        }
        a->lse[m] = top + logarithm((float)sum);
    }
}

// p = factor exp(scores - lse), with exponentials of at least e^-60: subnormal numbers would slow down products of p.
EVERY_VECTOR_WIDTH void regvq_softmax_rows(const Pass *a, int64_t begin, int64_t end)
{
    int64_t n = a->num_codes;
    for (int64_t m = begin; m < end; m++) {
        const float *s = a->scores + m * n;
        float *p = a->p + m * n, lse = a->lse[m], factor = a->factor[m];
#pragma omp simd  // p may be s
        for (int64_t i = 0; i < n; i++) {
            float x = s[i] - lse;
            p[i] = x > -60 ? x : -60;
        }
        for (int64_t i = 0; i < n; i++) p[i] = factor * exponential(p[i]);
    }
}

// -------------------------------------------------------------------------------------------------------- threads

typedef void Rows(const Pass *, int64_t, int64_t);

// PyTorch's pool, where both use one OpenMP library. Its team stays whole, since libgomp ends threads that a call leaves
// out; with few parts some do nothing.
static void run(Rows *rows, const Pass *pass, int64_t num_rows, int64_t num_parts)
{
#pragma omp parallel for schedule(static) if (num_parts > 1)
    for (int64_t i = 0; i < num_parts; i++) rows(pass, num_rows * i / num_parts, num_rows * (i + 1) / num_parts);
}

// Write the noise of some rows over all codes of a head.
void regvq_noise(
    int64_t num_parts, int64_t num_rows, int64_t num_codes, int64_t seed, int64_t head, const int64_t *rows,
    float *out)
{
    Pass pass = {.num_codes = num_codes, .seed = seed, .head = head, .rows = rows, .scores = out};
    run(regvq_noise_rows, &pass, num_rows, num_parts);
}

// Add the bias to the scores, and write the best codes; with rows also add the noise, write the codes that are best
// then, and divide the scores by t.
void regvq_select(
    int64_t num_parts, int64_t num_rows, int64_t num_codes, int64_t seed, int64_t head, const int64_t *rows,
    const float *t, const float *bias, float *scores, int64_t *best, int64_t *selected)
{
    Pass pass = {.num_codes = num_codes, .seed = seed, .head = head, .rows = rows, .t = t, .bias = bias,
                 .scores = scores, .best = best, .selected = selected};
    run(regvq_select_rows, &pass, num_rows, num_parts);
}

// Write p, and change grad in place. p may be scores.
void regvq_softmax_backward(
    int64_t num_parts, int64_t num_rows, int64_t num_codes, float *scores, const float *column_bias,
    const int64_t *group, float *p, float *grad)
{
    Pass pass = {.num_codes = num_codes, .scores = scores, .column_bias = column_bias, .group = group, .p = p,
                 .grad = grad};
    run(regvq_softmax_backward_rows, &pass, num_rows, num_parts);
}

void regvq_log_sum_exp(int64_t num_parts, int64_t num_rows, int64_t num_codes, float *scores, float *lse)
{
    Pass pass = {.num_codes = num_codes, .scores = scores, .lse = lse};
    run(regvq_log_sum_exp_rows, &pass, num_rows, num_parts);
}

// Write p. It may be scores.
void regvq_softmax(
    int64_t num_parts, int64_t num_rows, int64_t num_codes, float *scores, float *lse, const float *factor, float *p)
{
    Pass pass = {.num_codes = num_codes, .scores = scores, .lse = lse, .factor = factor, .p = p};
    run(regvq_softmax_rows, &pass, num_rows, num_parts);
}
