/* Runs an exported model from C.

     cc -DMODEL=convnet -include convnet.h run.c -L. -lconvnet -o run     (the shared library)
     cc -DMODEL=convnet -include convnet.h run.c libconvnet.a -lm -lpthread -o run     (the static one)
     ./run convnet.input convnet.output [threads [calls]]

   The input file holds rows of the model's one input; the output file gets those of its one output. */
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define CALL(function) JOIN(MODEL, function)

static void check(kg_status status, const char *what)
{
    if (status != KG_OK) {
        fprintf(stderr, "%s: %s\n", what, CALL(status_text)(status));
        exit(1);
    }
}

static void *read_file(const char *path, size_t *bytes)
{
    FILE *file = fopen(path, "rb");
    void *data;
    if (file == NULL || fseek(file, 0, SEEK_END))
        return NULL;
    *bytes = (size_t)ftell(file);
    rewind(file);
    data = malloc(*bytes + 1);
    if (data && fread(data, 1, *bytes, file) != *bytes)
        data = NULL;
    fclose(file);
    return data;
}

int main(int argc, char **argv)
{
    const kg_tensor_info *info = CALL(input)(0);
    int threads = argc > 3 ? atoi(argv[3]) : 1, calls = argc > 4 ? atoi(argv[4]) : 1, axis, call;
    size_t row = info->dtype == KG_FLOAT32 || info->dtype == KG_INT32 ? 4 : 8, bytes = 0;
    int64_t shape[8];
    const int64_t *shapes[] = {shape};
    struct timespec begin, end;
    void *input, *output, *workspace;
    kg_plan *plan;
    kg_pool *pool = NULL;
    FILE *file;

    if (argc < 3 || (input = read_file(argv[1], &bytes)) == NULL) {
        fprintf(stderr, "usage: %s INPUT OUTPUT [THREADS [CALLS]]\n", argv[0]);
        return 2;
    }
    for (axis = 1; axis < info->rank; axis++)
        row *= (size_t)(shape[axis] = info->shape[axis]);
    shape[0] = (int64_t)(bytes / row);

    /* Once per shape: a plan. Once per process: a pool. Once per call in flight: a workspace. */
    check(CALL(plan)(malloc(CALL(plan_bytes)()), CALL(plan_bytes)(), shapes, threads, &plan), "plan");
    if (threads > 1)
        check(CALL(pool_start)(malloc(CALL(pool_bytes)()), CALL(pool_bytes)(), threads, &pool), "pool");
    workspace = malloc(CALL(workspace_bytes)(plan));
    output = malloc(CALL(output_bytes)(plan, 0));

    clock_gettime(CLOCK_MONOTONIC, &begin);
    for (call = 0; call < calls; call++) {
        const void *inputs[] = {input};
        void *outputs[] = {output};
        check(CALL(run)(plan, pool, workspace, CALL(workspace_bytes)(plan), inputs, outputs), "run");
    }
    clock_gettime(CLOCK_MONOTONIC, &end);
    printf("%s: %.2f us a call\n", CALL(level)(),
           ((double)(end.tv_sec - begin.tv_sec) * 1e6 + (double)(end.tv_nsec - begin.tv_nsec) * 1e-3) / calls);

    file = fopen(argv[2], "wb");
    if (file == NULL || fwrite(output, 1, CALL(output_bytes)(plan, 0), file) != CALL(output_bytes)(plan, 0)) {
        perror(argv[2]);
        return 1;
    }
    fclose(file);
    CALL(pool_stop)(pool);
    return 0;
}
