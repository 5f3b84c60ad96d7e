// Deterministic content for the payload files: payload NAME VERSION BYTES CHANGED
// Of each 64 KiB, the first half is pseudo-random and the second half compresses well. A 4 KiB block differs
// between versions when a fixed function of NAME and its number says so, for CHANGED of 100 blocks.
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

static uint64_t mix(uint64_t x) { // splitmix64
    x += 0x9e3779b97f4a7c15;
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

int main(int argc, char **argv) {
    if (argc != 5) return 2;
    uint64_t name = 7, version = strtoull(argv[2], NULL, 10), bytes = strtoull(argv[3], NULL, 10);
    uint64_t changed = strtoull(argv[4], NULL, 10);
    for (char *p = argv[1]; *p; p++) name = mix(name ^ (uint64_t)*p);
    for (uint64_t block = 0; block * 4096 < bytes; block++) {
        uint64_t seed = mix(name ^ mix(block)), left = bytes - block * 4096;
        if (seed % 100 < changed) seed = mix(seed ^ version << 8);
        char out[4096 + 64];
        for (uint64_t i = 0; i < 4096;) {
            uint64_t r = mix(seed + i);
            if (block / 8 % 2 == 0) { for (int k = 0; k < 8; k++) out[i++] = (char)(r >> 8 * k); }
            else i += sprintf(out + i, "line %04u of the payload, shelf %u\n", (unsigned)(r % 10000), (unsigned)(seed % 97));
        }
        fwrite(out, 1, left < 4096 ? left : 4096, stdout);
    }
    return fflush(stdout) || ferror(stdout);
}
