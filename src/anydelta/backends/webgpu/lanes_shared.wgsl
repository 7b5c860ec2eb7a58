// The sum over the lanes of a column, through workgroup memory. LANES is a power of two.
var<workgroup> partials: array<f32, WORKGROUP>;

fn over_lanes(x: f32, id: u32) -> f32 {
    if (LANES == 1u) { return x; }
    partials[id] = x;
    workgroupBarrier();
    var sum = 0.0;
    for (var l = 0u; l < LANES; l++) { sum += partials[id - id % LANES + l]; }
    workgroupBarrier();
    return sum;
}
