// Runs an exported model from C++, every resource owned by an object.
//
//     c++ -std=c++17 -DMODEL=lstm -include lstm.h run.cpp -L. -llstm -o run
//     ./run lstm.input lstm.output
#include <cstdio>
#include <fstream>
#include <iterator>
#include <stdexcept>
#include <vector>

#define JOIN_(a, b) a##_##b
#define JOIN(a, b) JOIN_(a, b)
#define CALL(function) JOIN(MODEL, function)

class Model {
public:
    // Prepared for one shape of the input.
    Model(std::vector<int64_t> shape, int threads) : plan_memory_(CALL(plan_bytes)()), pool_memory_(CALL(pool_bytes)())
    {
        const int64_t *shapes[] = {shape.data()};
        check(CALL(plan)(plan_memory_.data(), plan_memory_.size(), shapes, threads, &plan_));
        check(CALL(pool_start)(pool_memory_.data(), pool_memory_.size(), threads, &pool_));
        workspace_.resize(CALL(workspace_bytes)(plan_));
    }
    Model(const Model &) = delete;
    Model &operator=(const Model &) = delete;
    ~Model() { CALL(pool_stop)(pool_); }

    std::vector<char> operator()(const std::vector<char> &input)
    {
        std::vector<char> output(CALL(output_bytes)(plan_, 0));
        const void *inputs[] = {input.data()};
        void *outputs[] = {output.data()};
        check(CALL(run)(plan_, pool_, workspace_.data(), workspace_.size(), inputs, outputs));
        return output;
    }

private:
    static void check(kg_status status)
    {
        if (status != KG_OK)
            throw std::runtime_error(CALL(status_text)(status));
    }

    std::vector<char> plan_memory_, pool_memory_, workspace_;
    kg_plan *plan_ = nullptr;
    kg_pool *pool_ = nullptr;
};

int main(int argc, char **argv)
try {
    if (argc < 3)
        throw std::runtime_error("usage: run INPUT OUTPUT");
    std::ifstream file(argv[1], std::ios::binary);
    std::vector<char> input{std::istreambuf_iterator<char>(file), {}};
    const kg_tensor_info *info = CALL(input)(0);
    std::vector<int64_t> shape(info->shape, info->shape + info->rank);
    int64_t row = 4;
    for (int axis = 1; axis < info->rank; axis++)
        row *= shape[axis];
    shape[0] = static_cast<int64_t>(input.size()) / row;
    Model model(shape, 2);
    std::vector<char> output = model(input);
    std::ofstream(argv[2], std::ios::binary).write(output.data(), static_cast<std::streamsize>(output.size()));
    return 0;
} catch (const std::exception &error) {
    std::fprintf(stderr, "%s\n", error.what());
    return 1;
}
