/* Calls an exported model from several threads at once, a workspace each, and compares every result.

     cc -DMODEL=tiny_mlp -include tiny_mlp.h threads.c libtiny_mlp.a -lm -lpthread -o threads
     ./threads tiny_mlp.input tiny_mlp.expected THREADS CALLS */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define CALL(function) JOIN(MODEL, function)

static char input[1 << 20], expected[1 << 20];
static size_t input_bytes, expected_bytes;
static kg_plan *plan;
static kg_pool *pool;
static int calls;

static void *work(void *argument)
{
    size_t bytes = CALL(workspace_bytes)(plan);
    void *workspace = malloc(bytes), *output = malloc(expected_bytes);
    const void *inputs[] = {input};
    void *outputs[] = {output};
    long wrong = 0;
    int call;
    (void)argument;
    for (call = 0; call < calls; call++)
        if (CALL(run)(plan, pool, workspace, bytes, inputs, outputs) != KG_OK || memcmp(output, expected, expected_bytes))
            wrong++;
    free(workspace);
    free(output);
    return (void *)wrong;
}

static size_t read_file(const char *path, char *to, size_t most)
{
    FILE *file = fopen(path, "rb");
    size_t bytes = file ? fread(to, 1, most, file) : 0;
    if (file)
        fclose(file);
    return bytes;
}

int main(int argc, char **argv)
{
    const kg_tensor_info *info = CALL(input)(0);
    pthread_t threads[64];
    int64_t shape[8];
    const int64_t *shapes[] = {shape};
    size_t row = 4;
    long wrong = 0;
    void *memory, *pool_memory, *result;
    int count, k;
    if (argc < 5 || (count = atoi(argv[3])) < 1 || count > 64)
        return 2;
    calls = atoi(argv[4]);
    input_bytes = read_file(argv[1], input, sizeof(input));
    expected_bytes = read_file(argv[2], expected, sizeof(expected));
    for (k = 1; k < info->rank; k++)
        row *= (size_t)(shape[k] = info->shape[k]);
    shape[0] = (int64_t)(input_bytes / row);
    memory = malloc(CALL(plan_bytes)());
    pool_memory = malloc(CALL(pool_bytes)());
    if (CALL(plan)(memory, CALL(plan_bytes)(), shapes, 2, &plan) != KG_OK ||
        CALL(pool_start)(pool_memory, CALL(pool_bytes)(), 2, &pool) != KG_OK ||
        CALL(output_bytes)(plan, 0) != expected_bytes)
        return 3;
    for (k = 0; k < count; k++)
        if (pthread_create(&threads[k], NULL, work, NULL))
            return 4;
    for (k = 0; k < count; k++) {
        pthread_join(threads[k], &result);
        wrong += (long)result;
    }
    CALL(pool_stop)(pool);
    free(memory);
    free(pool_memory);
    printf("%d threads x %d calls, %ld wrong\n", count, calls, wrong);
    return wrong != 0;
}
