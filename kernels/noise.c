// Uniform numbers behind the Gumbel noise of some rows over all codes, on a CPU. The bits equal those of
// regvq_fast/ops/noise.py, which documents the counters of Philox4x32-10.

#include <stdint.h>

#if defined(__x86_64__)
#define EVERY_VECTOR_WIDTH __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define EVERY_VECTOR_WIDTH
#endif

enum { BLOCKS = 64 };  // blocks of four codes per call; compilers vectorize the loops over them

static inline __attribute__((always_inline)) void philox(
    uint64_t seed, uint64_t row, uint32_t first_block, float *restrict out)
{
    uint32_t c0[BLOCKS], c1[BLOCKS], c2[BLOCKS], c3[BLOCKS];
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int j = 0; j < BLOCKS; j++) {
        c0[j] = first_block + (uint32_t)j;
        c1[j] = (uint32_t)(row >> 32);
        c2[j] = (uint32_t)row;
        c3[j] = 0;
    }
    for (int round = 0; round < 10; round++) {
        for (int j = 0; j < BLOCKS; j++) {
            uint64_t product_0 = (uint64_t)c0[j] * 0xD2511F53u, product_1 = (uint64_t)c2[j] * 0xCD9E8D57u;
            c0[j] = (uint32_t)(product_1 >> 32) ^ c1[j] ^ k0;
            c2[j] = (uint32_t)(product_0 >> 32) ^ c3[j] ^ k1;
            c1[j] = (uint32_t)product_1;
            c3[j] = (uint32_t)product_0;
        }
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < BLOCKS; j++) {
        uint32_t words[4] = {c0[j], c1[j], c2[j], c3[j]};
        for (int i = 0; i < 4; i++) {
            float v = ((float)words[i] + 0.5f) * 0x1p-32f;
            out[4 * j + i] = v < 1 - 0x1p-24f ? v : 1 - 0x1p-24f;
        }
    }
}

// rows (num_rows,), out (num_rows, num_codes) of one head; each head's codes begin a new block
EVERY_VECTOR_WIDTH void regvq_uniform(
    int64_t seed, const int64_t *rows, int64_t num_rows, int64_t num_codes, int64_t head, float *out)
{
    int64_t head_block = head * ((num_codes + 3) / 4);
    float last[4 * BLOCKS];
    for (int64_t r = 0; r < num_rows; r++) {
        for (int64_t code = 0; code < num_codes; code += 4 * BLOCKS) {
            int64_t left = num_codes - code;
            float *target = out + r * num_codes + code;
            uint32_t first_block = (uint32_t)(head_block + code / 4);
            philox((uint64_t)seed, (uint64_t)rows[r], first_block, left < 4 * BLOCKS ? last : target);
            for (int64_t j = 0; left < 4 * BLOCKS && j < left; j++) target[j] = last[j];
        }
    }
}
