"""What a hospital demands of every run, whatever the run asks for. The server cannot change a word of it."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

from fedssl.errors import ConfigError, PrivacyError


@dataclass(frozen=True)
class Profile:
    """A hospital's demands on privacy.

    Attributes:
        name: for people.
        private: whether only private runs may train here.
        cap: largest epsilon of a patient, over all runs and studies of the ledger.
        delta: largest delta.
        prototype_patients: patients that must stand behind a prototype that leaves.
    """

    name: str
    private: bool
    cap: float
    delta: float
    prototype_patients: int

    def admit(self, *, private: bool, delta: float | None) -> None:
        """Refuse a run that this hospital does not take part in.

        Raises:
            PrivacyError: names the line of the policy and what to do.
        """
        if not private:
            if self.private:
                raise PrivacyError(
                    f"is under the privacy profile {self.name}, which lets only private runs train here. Start the run "
                    "with privacy=patient (and this site among privacy.sites)"
                )
        elif delta is None or delta > self.delta:
            raise PrivacyError(
                f"is under the privacy profile {self.name}, which allows a delta of {self.delta:g} at most; the run "
                f"has {delta}. Lower privacy.delta"
            )


PROFILES: Mapping[str, Profile] = {
    profile.name: profile
    for profile in (
        Profile("research-open", private=False, cap=10.0, delta=1e-5, prototype_patients=1),
        Profile("consortium", private=True, cap=8.0, delta=1e-6, prototype_patients=5),
        Profile("strict", private=True, cap=3.0, delta=1e-6, prototype_patients=10),
    )
}
SIMULATED = Profile("simulation", private=False, cap=float("inf"), delta=1.0, prototype_patients=1)


def profile_of(name: str, cap: float | None) -> Profile:
    """Return the profile of this name, with the hospital's own cap if it gives one.

    Raises:
        ConfigError: there is no such profile, or the cap is no number above 0.
    """
    if name not in PROFILES:
        raise ConfigError(f"has an unknown privacy profile; there are {', '.join(PROFILES)}")
    if cap is not None and not 0.0 < cap < float("inf"):
        raise ConfigError("has an epsilon cap that is no number above 0")
    return PROFILES[name] if cap is None else replace(PROFILES[name], cap=cap)
