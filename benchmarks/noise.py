"""What bfloat16 alone does to a score: `scores.noise_floor` of the embedded model.

python benchmarks/noise.py --users dev_questions.json --examples 8
"""

import argparse

import dps_lens as dps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", default="probe")
    parser.add_argument("--examples", type=int, default=8, help="one of each user")
    arguments = parser.parse_args()
    users = dps.load_users(arguments.users, max_users=arguments.examples)
    low, reference = dps.load_model(dtype="bfloat16"), dps.load_model(dtype="float32")
    scores = dps.score_heads(low, users, ablation="zero", against="no_profile", method="exact", max_examples=1)
    floor = dps.measure_noise(scores, low, reference, users, n_examples=len(users))
    print(f"bfloat16 - float32, profile-specific PCS, {floor.n_examples} examples x {scores.values[0].numel()} heads")
    print(f"SD {floor.sd:.5f}, mean bias {floor.bias:+.5f} nats per token")
    print(f"floor of a mean of {len(users)} examples: {floor.of_mean(len(users)):.5f}")
    above = dps.significant_heads(scores).above_noise
    print(
        f"heads above it: {int(above.sum())} of {above.numel()}; SD of all mean scores {float(scores.mean().std()):.5f}"
    )


if __name__ == "__main__":
    main()
