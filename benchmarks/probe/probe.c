/* How fast this machine reads memory and multiplies float32, with nothing in the way.
 *
 *     gcc -O3 -march=native -pthread probe.c -o probe
 *     ./probe read THREADS SECONDS        bytes per second
 *     ./probe multiply THREADS SECONDS    FLOP per second
 *
 * Prints the best of ROUNDS rounds. Reading: each thread loads a share of its own of BYTES bytes,
 * several streams at a time. Multiplying: each thread keeps as many independent multiply-adds going
 * as fill the pipelines, all in registers. Knows nothing of edgekit.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <time.h>

#if defined(__AVX512F__)
#define WIDTH 64
#define CHAINS 20
#elif defined(__AVX__)
#define WIDTH 32
#define CHAINS 12
#else
#define WIDTH 16
#define CHAINS 16
#endif

#define BYTES ((size_t)1 << 30)
#define MOST_THREADS 64
#ifndef STREAMS
#define STREAMS 6 /* how many fill the memory's queues best depends on the CPU */
#endif
#define LINE 64 /* bytes that memory gives at a time */
#define ROUNDS 100
#define PIECE ((size_t)8 << 20)

/* Takes a value into a vector register, and does nothing with it. */
#if defined(__x86_64__)
#define LOAD(value) __asm__ volatile("" ::"v"(value))
#else
#define LOAD(value) __asm__ volatile("" ::"w"(value))
#endif

typedef float floats __attribute__((vector_size(WIDTH)));
typedef uint64_t words __attribute__((vector_size(WIDTH)));

struct job {
    int number, count;
    double seconds, rates[ROUNDS];
    char *data;
    pthread_barrier_t *start;
};

static double now(void) {
    struct timespec time;
    clock_gettime(CLOCK_MONOTONIC, &time);
    return time.tv_sec + time.tv_nsec * 1e-9;
}

static double read_once(const char *data, size_t bytes) {
    const size_t length = bytes / STREAMS / LINE * (LINE / WIDTH);
    const words *at = (const words *)data;
    for (size_t i = 0; i < length; i += LINE / WIDTH)
#pragma GCC unroll 16
        for (int stream = 0; stream < STREAMS; stream++)
#pragma GCC unroll 4
            for (int word = 0; word < LINE / WIDTH; word++)
                LOAD(at[stream * length + i + word]);
    return (double)(length * STREAMS * WIDTH);
}

static double multiply_once(void) {
    const int times = 100000;
    floats scale, offset, chains[CHAINS];
    for (size_t lane = 0; lane < WIDTH / sizeof(float); lane++) {
        scale[lane] = 0.999f;
        offset[lane] = 0.001f;
    }
    for (int chain = 0; chain < CHAINS; chain++) chains[chain] = offset * (float)chain;
    __asm__ volatile("" : "+m"(scale), "+m"(offset));
    for (int i = 0; i < times; i++)
#pragma GCC unroll 32 /* by itself gcc unrolls up to 16 turns, and keeps the chains in memory */
        for (int chain = 0; chain < CHAINS; chain++)
            chains[chain] = chains[chain] * scale + offset;
    for (int chain = 0; chain < CHAINS; chain++) __asm__ volatile("" ::"m"(chains[chain]));
    return 2.0 * times * CHAINS * (WIDTH / sizeof(float));
}

static void *work(void *argument) {
    struct job *job = argument;
    const size_t share = BYTES / job->count / PIECE * PIECE;
    size_t at = 0;
    for (int round = 0; round < ROUNDS; round++) {
        double amount = 0, began, spent;
        pthread_barrier_wait(job->start);
        began = now();
        do {
            if (job->data) {
                amount += read_once(job->data + job->number * share + at, PIECE);
                at = at + PIECE < share ? at + PIECE : 0;
            } else {
                amount += multiply_once();
            }
            spent = now() - began;
        } while (spent < job->seconds / ROUNDS);
        job->rates[round] = amount / spent;
    }
    return NULL;
}

int main(int argc, char **argv) {
    static struct job jobs[MOST_THREADS];
    static pthread_t threads[MOST_THREADS];
    pthread_barrier_t start;
    char *data = NULL;
    double best = 0;
    const int count = argc == 4 ? atoi(argv[2]) : 0;
    if (count < 1 || count > MOST_THREADS) {
        fprintf(stderr, "usage: probe read|multiply THREADS SECONDS\n");
        return 2;
    }
    if (!strcmp(argv[1], "read")) {
        data = mmap(NULL, BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        if (data == MAP_FAILED) {
            perror("mmap");
            return 1;
        }
        madvise(data, BYTES, MADV_HUGEPAGE);
        memset(data, 1, BYTES);
    }
    pthread_barrier_init(&start, NULL, count);
    for (int i = 0; i < count; i++) {
        jobs[i] = (struct job){i, count, atof(argv[3]), {0}, data, &start};
        pthread_create(&threads[i], NULL, work, &jobs[i]);
    }
    for (int i = 0; i < count; i++) pthread_join(threads[i], NULL);
    for (int round = 0; round < ROUNDS; round++) {
        double rate = 0;
        for (int i = 0; i < count; i++) rate += jobs[i].rates[round];
        if (rate > best) best = rate;
    }
    printf("%.0f\n", best);
    return 0;
}
