// A team of threads, and work that each of them takes first from its own share, then from the others'.

#ifndef DIT_QUANT_TEAM_H
#define DIT_QUANT_TEAM_H

#include <stdint.h>

#define MOST_SHARES 64

// GOMP_parallel and omp_get_thread_num of the OpenMP runtime that torch runs on: a second pool of threads would fight
// with torch's
typedef void (*parallel_t)(void (*work)(void *), void *data, unsigned threads, unsigned flags);
typedef int (*number_t)(void);

// a cache line of its own
typedef struct {
    int64_t taken, unused[7];
} Share;

typedef struct {
    parallel_t parallel;
    number_t number;
    int64_t threads, shares;
    Share share[MOST_SHARES];
} Team;

// with as many shares as threads, but no more than `most`
static inline Team team(parallel_t parallel, number_t number, unsigned threads, int64_t most) {
    int64_t shares = threads < MOST_SHARES ? threads : MOST_SHARES;
    if (shares > most) shares = most < 1 ? 1 : most;
    return (Team){.parallel = parallel, .number = number, .threads = threads, .shares = shares};
}

// the threads that have a share in common, at most
static inline int64_t sharers(const Team *team) { return (team->threads + team->shares - 1) / team->shares; }

// the same for the same thread in every run
static inline int64_t own_share(const Team *team) { return team->number() * team->shares / team->threads; }

// the first of the next `count` items of a share
static inline int64_t take(Team *team, int64_t share, int64_t count) {
    return __atomic_fetch_add(&team->share[share].taken, count, __ATOMIC_RELAXED);
}

static inline void run(Team *team, void (*work)(void *), void *data) {
    for (int64_t i = 0; i < team->shares; i++) team->share[i].taken = 0;
    team->parallel(work, data, (unsigned)team->threads, 0);
}

#endif
