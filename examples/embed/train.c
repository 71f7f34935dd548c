/* Trains a network in C: steps over shuffled batches, then the weights go to the forward pass by way of a file.

     cc -O2 train.c libdigits_step.a libdigits.a -lm -lpthread -o train
     ./train FOLDER EPOCHS     (exits with 0 where at least 97 % of the test digits are right) */
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "digits.h"
#include "digits_step.h"

enum { PIXELS = 64, BATCH = 64, CLASSES = 10, MOST = 2000 };

static float train_x[MOST][PIXELS], test_x[MOST][PIXELS], batch_x[BATCH][PIXELS], scores[MOST][CLASSES];
static int32_t train_y[MOST], test_y[MOST], batch_y[BATCH];

static size_t read_rows(const char *folder, const char *name, void *to, size_t row)
{
    char path[4096];
    FILE *file;
    size_t rows;
    snprintf(path, sizeof(path), "%s/%s.bin", folder, name);
    file = fopen(path, "rb");
    if (file == NULL) {
        perror(path);
        exit(1);
    }
    rows = fread(to, row, MOST, file);
    fclose(file);
    return rows;
}

static void check(kg_status status, const char *what)
{
    if (status != KG_OK) {
        fprintf(stderr, "%s: %s\n", what, digits_step_status_text(status));
        exit(1);
    }
}

static kg_plan *plan_step(int64_t rows)
{
    int64_t x[] = {rows, 8, 8, 1}, y[] = {rows};
    const int64_t *shapes[] = {x, y};
    kg_plan *plan;
    check(digits_step_plan(malloc(digits_step_plan_bytes()), digits_step_plan_bytes(), shapes, 2, &plan), "plan");
    return plan;
}

int main(int argc, char **argv)
{
    const char *folder = argc > 1 ? argv[1] : ".";
    int epochs = argc > 2 ? atoi(argv[2]) : 15, epoch, right = 0;
    size_t rows = read_rows(folder, "train_x", train_x, sizeof(train_x[0])), tests, i, k;
    size_t whole = rows / BATCH;
    static size_t order[MOST];
    unsigned long random = 1;
    float logs[8];
    void *outputs[8], *workspace, *state = malloc(digits_step_state_bytes());
    const void *inputs[] = {batch_x, batch_y};
    kg_plan *plan = plan_step(BATCH);
    kg_pool *pool;
    size_t workspace_bytes = digits_step_workspace_bytes(plan);
    char path[4096];

    read_rows(folder, "train_y", train_y, sizeof(train_y[0]));
    tests = read_rows(folder, "test_x", test_x, sizeof(test_x[0]));
    read_rows(folder, "test_y", test_y, sizeof(test_y[0]));
    check(digits_step_state_init(state, digits_step_state_bytes()), "state");
    check(digits_step_pool_start(malloc(digits_step_pool_bytes()), digits_step_pool_bytes(), 2, &pool), "pool");
    workspace = malloc(workspace_bytes);
    for (k = 0; k < 8; k++)
        outputs[k] = &logs[k];
    for (i = 0; i < rows; i++)
        order[i] = i;

    for (epoch = 0; epoch < epochs; epoch++) {
        for (i = rows - 1; i > 0; i--) {
            size_t other = (random = random * 6364136223846793005UL + 1442695040888963407UL) % (i + 1), kept = order[i];
            order[i] = order[other];
            order[other] = kept;
        }
        check(digits_step_reset_metrics(state), "metrics");
        for (i = 0; i < whole; i++) {
            for (k = 0; k < BATCH; k++) {
                memcpy(batch_x[k], train_x[order[i * BATCH + k]], sizeof(batch_x[k]));
                batch_y[k] = train_y[order[i * BATCH + k]];
            }
            check(digits_step_train_step(plan, pool, workspace, workspace_bytes, state, inputs, outputs), "step");
        }
        printf("epoch %d:", epoch + 1);
        for (k = 0; k < (size_t)digits_step_num_outputs(); k++)
            printf(" %s %.4f", digits_step_output((int)k)->name, logs[k]);
        printf("\n");
    }
    digits_step_pool_stop(pool);

    snprintf(path, sizeof(path), "%s/trained.safetensors", folder);
    check(digits_step_save_weights(state, path), "save");
    {
        int64_t shape[] = {(int64_t)tests, 8, 8, 1};
        const int64_t *shapes[] = {shape};
        const void *test_inputs[] = {test_x};
        void *test_outputs[] = {scores}, *weights = malloc(digits_state_bytes());
        check(digits_state_init(weights, digits_state_bytes()), "state");
        check(digits_load_weights(weights, path), "load");
        check(digits_plan(malloc(digits_plan_bytes()), digits_plan_bytes(), shapes, 1, &plan), "plan");
        workspace_bytes = digits_workspace_bytes(plan);
        check(digits_run(plan, NULL, malloc(workspace_bytes), workspace_bytes, weights, test_inputs, test_outputs), "run");
    }
    for (i = 0; i < tests; i++) {
        size_t best = 0;
        for (k = 1; k < CLASSES; k++)
            if (scores[i][k] > scores[i][best])
                best = k;
        right += (int32_t)best == test_y[i];
    }
    printf("test accuracy %.4f\n", (double)right / (double)tests);
    return (double)right < 0.97 * (double)tests;
}
