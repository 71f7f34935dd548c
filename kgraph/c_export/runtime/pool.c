/* A pool of threads that take part in calls. One call at a time has the pool; a caller that finds it busy runs alone.
   Waiting is spinning for a while, then sleeping on a condition. */
#include <pthread.h>
#include <sched.h>
#include <unistd.h>

enum { KG_OPEN = 1 << 30, KG_SPINS_IN_CALL = 20000, KG_SPINS_IDLE = 4000, KG_MAX_THREADS = 256 };

typedef struct kg_job kg_job;

struct kg_pool {
    _Alignas(KG_LINE) atomic_int busy;
    _Alignas(KG_LINE) atomic_int ticket; /* changes when there is a job, and when the pool stops */
    _Alignas(KG_LINE) atomic_int state;  /* KG_OPEN while workers may enter, plus the number of those inside */
    _Alignas(KG_LINE) atomic_int sleepers;
    _Alignas(KG_LINE) kg_job *job;
    int size, threads, stopping; /* size: of this structure, which tells versions apart */
    pid_t process;
    pthread_mutex_t mutex;
    pthread_cond_t changed;
    pthread_t workers[KG_MAX_THREADS];
};

typedef struct {
    kg_pool *pool;
    int number;
} kg_worker;

static void kg_work(kg_job *job, int thread);

static void kg_pause(void)
{
#if defined(__x86_64__)
    __builtin_ia32_pause();
#elif defined(__aarch64__)
    __asm__ __volatile__("yield");
#endif
}

/* Return once `*word` differs from `old`. The sleeper count is raised before the word is looked at again, and whoever
   changes the word reads the count after: one of the two sees the other. */
static void kg_wait(kg_pool *pool, atomic_int *word, int old, int spins)
{
    int i;
    for (i = 0; i < spins; i++) {
        if (atomic_load_explicit(word, memory_order_acquire) != old)
            return;
        kg_pause();
    }
    pthread_mutex_lock(&pool->mutex);
    atomic_fetch_add(&pool->sleepers, 1);
    while (atomic_load(word) == old)
        pthread_cond_wait(&pool->changed, &pool->mutex);
    atomic_fetch_sub(&pool->sleepers, 1);
    pthread_mutex_unlock(&pool->mutex);
}

static void kg_wake(kg_pool *pool)
{
    if (atomic_load(&pool->sleepers) > 0) {
        pthread_mutex_lock(&pool->mutex);
        pthread_cond_broadcast(&pool->changed);
        pthread_mutex_unlock(&pool->mutex);
    }
}

static void *kg_worker_main(void *argument)
{
    kg_pool *pool = ((kg_worker *)argument)->pool;
    int number = ((kg_worker *)argument)->number, seen = 0;
    atomic_store(&pool->busy, 0); /* the argument has been read */
    kg_wake(pool);
    for (;;) {
        int state;
        kg_wait(pool, &pool->ticket, seen, KG_SPINS_IDLE);
        seen = atomic_load_explicit(&pool->ticket, memory_order_acquire);
        state = atomic_load_explicit(&pool->state, memory_order_acquire);
        while ((state & KG_OPEN) && !atomic_compare_exchange_weak(&pool->state, &state, state + 1))
            ;
        if (state & KG_OPEN) {
            if (pool->stopping)
                break;
            kg_work(pool->job, number);
            if (atomic_fetch_sub(&pool->state, 1) == 1)
                kg_wake(pool);
        }
    }
    return 0;
}

static void kg_open(kg_pool *pool, kg_job *job)
{
    pool->job = job;
    atomic_store_explicit(&pool->state, KG_OPEN, memory_order_release);
    atomic_fetch_add(&pool->ticket, 1);
    kg_wake(pool);
}

/* Nobody enters any more; return when those inside have left. */
static void kg_close(kg_pool *pool)
{
    int inside = atomic_fetch_and(&pool->state, KG_OPEN - 1) & (KG_OPEN - 1);
    while (inside) {
        kg_wait(pool, &pool->state, inside, KG_SPINS_IN_CALL);
        inside = atomic_load_explicit(&pool->state, memory_order_acquire);
    }
}

static size_t kg_pool_size(void)
{
    return sizeof(kg_pool) + KG_LINE;
}

static kg_status kg_pool_begin(void *memory, size_t bytes, int threads, kg_pool **result)
{
    kg_pool *pool = (kg_pool *)(((uintptr_t)memory + KG_LINE - 1) & ~(uintptr_t)(KG_LINE - 1));
    int number;
    if (memory == 0 || threads < 1 || threads > KG_MAX_THREADS)
        return KG_INVALID_ARGUMENT;
    if (bytes < kg_pool_size())
        return KG_TOO_SMALL;
    memset(pool, 0, sizeof(*pool));
    pool->size = (int)sizeof(kg_pool);
    pool->process = getpid();
    if (pthread_mutex_init(&pool->mutex, 0) || pthread_cond_init(&pool->changed, 0))
        return KG_SYSTEM;
    for (number = 1; number < threads; number++) {
        kg_worker argument = {pool, number};
        atomic_store(&pool->busy, 1);
        if (pthread_create(&pool->workers[number], 0, kg_worker_main, &argument)) {
            atomic_store(&pool->busy, 0);
            break; /* the system lets no more be started; calls use those that there are */
        }
        kg_wait(pool, &pool->busy, 1, 0);
    }
    pool->threads = number;
    *result = pool;
    return KG_OK;
}

static void kg_pool_end(kg_pool *pool)
{
    int number;
    if (pool == 0 || pool->process != getpid())
        return; /* in a forked child the workers do not exist */
    pool->stopping = 1;
    kg_open(pool, 0);
    for (number = 1; number < pool->threads; number++)
        pthread_join(pool->workers[number], 0);
    pthread_cond_destroy(&pool->changed);
    pthread_mutex_destroy(&pool->mutex);
}
