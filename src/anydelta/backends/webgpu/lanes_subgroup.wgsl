// The sum over the lanes of a column, by subgroup shuffles. In WebGPU the subgroup size cannot be chosen, so LANES is
// at most the smallest size that the adapter may use.
fn over_lanes(x: f32, id: u32) -> f32 {
    var sum = x;
    for (var step = 1u; step < LANES; step *= 2u) { sum += subgroupShuffleXor(sum, step); }
    return sum;
}
