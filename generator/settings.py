"""Settings of the generator: what is rendered, what is refused, and where pictures are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

LATENT_PX = 8
"""Pixels of a picture that become one cell of Stable Diffusion's latents, along each side."""


class MattingSettings(BaseModel):
    """Limits of the cut-outs that are made of product pictures without a transparent ground."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    min_share: float = Field(
        0.01, description="Least share of the picture that a product covers; less is taken for nothing.", ge=0.0, le=1.0
    )
    max_share: float = Field(
        0.95, description="Largest share that a product covers; more is taken for a ground not found.", ge=0.0, le=1.0
    )
    max_edge_share: float = Field(
        0.3,
        description="Largest share of a side of the picture that the product may touch; more is a cropped product.",
        ge=0.0,
        le=1.0,
    )


class CheckSettings(BaseModel):
    """Limits of the checks that a creative must pass before it is published."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    max_prompt_chars: int = Field(400, description="Longest prompt, in characters.", ge=1)
    blocked_terms: tuple[str, ...] = Field(
        ("nude", "naked", "nsfw", "erotic", "gore", "corpse", "swastika", "suicide", "celebrity"),
        description="Words and phrases that no prompt may hold, in any case; matched as whole words.",
    )
    people_terms: tuple[str, ...] = Field(
        (
            *("portrait", "portraits", "selfie", "face", "faces", "person", "people", "human", "humans", "crowd"),
            *("man", "men", "woman", "women", "boy", "boys", "girl", "girls", "child", "children", "kid", "kids"),
            *("baby", "babies", "lady", "ladies", "gentleman", "fashion model", "influencer", "family", "couple"),
        ),
        description="Words for people that no prompt may hold outside the product's title; matched like blocked_terms.",
    )
    unsafe: bool = Field(True, description="Whether pictures are shown to the classifier of unsafe images (open_nsfw).")
    max_p_unsafe: float = Field(
        0.5,
        description="Largest probability of an unsafe image; its authors take 0.2 for safe, 0.8 for unsafe.",
        ge=0.0,
        le=1.0,
    )
    portraits: bool = Field(True, description="Whether faces are looked for in pictures, and refused (MTCNN).")
    min_face_side: float = Field(
        0.08, description="Smallest face that is looked for, as a share of the picture's side.", ge=0.03, le=1.0
    )
    min_p_face: float = Field(
        0.95, description="Least probability with which something is taken for a face.", ge=0.5, le=1.0
    )
    min_contrast: float = Field(
        12.0, description="Least standard deviation of the luminance, in levels of 255.", ge=0.0, le=127.0
    )
    min_entropy_bits: float = Field(
        4.0, description="Least entropy of the luminance's histogram, in bits of 8.", ge=0.0, le=8.0
    )
    max_fidelity_error: float = Field(
        4.0,
        description="Largest mean difference between picture and cut-out inside the product, in levels of 255.",
        ge=0.0,
        le=255.0,
    )
    max_off_share: float = Field(
        0.02,
        description="Largest share of the product's pixels that may differ by more than 32 levels.",
        ge=0.0,
        le=1.0,
    )
    max_likeness: float = Field(
        0.88,
        description="Largest likeness to a creative that the product has: the cosine of their image features. Scaled, "
        "compressed or trimmed copies are above; another scene, palette, light, prop or composition is below.",
        ge=-1.0,
        le=1.0,
    )


class SigningSettings(BaseModel):
    """Who signs the C2PA manifest of every published file."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["development", "own", "off"] = Field(
        "development",
        description="development: a certificate that this installation makes for itself and that nobody else trusts; "
        "own: certificate and private_key; off: files are labelled in XMP only.",
    )
    folder: Path = Field(
        Path("out/signing"), description="Folder of the development certificate and its key; made when missing."
    )
    certificate: Path | None = Field(
        None, description="PEM file of one's own certificate, followed by those that it was issued by."
    )
    private_key: Path | None = Field(None, description="PEM file of its private key, PKCS #8, without a password.")
    trust_anchors: Path | None = Field(
        None, description="PEM file of further certificates whose signatures `osmf creative show` trusts."
    )

    @model_validator(mode="after")
    def _own_is_whole(self) -> SigningSettings:
        if self.mode == "own" and (self.certificate is None or self.private_key is None):
            raise ValueError('mode "own" needs both certificate and private_key')
        return self


class DiffusionSettings(BaseModel):
    """Stable Diffusion with a ControlNet, as the diffusion renderer runs it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipeline: str | None = Field(
        None,
        description="Stable Diffusion 1.x or 2.x in diffusers' layout: a folder, or a hub id such as owner/name. "
        "Text-to-image and inpainting weights both do.",
        min_length=1,
    )
    controlnet: str | None = Field(
        None,
        description="ControlNet made for it: a folder or a hub id; not set: the pipeline's own.",
        min_length=1,
    )
    revision: str | None = Field(None, description="Branch, tag or commit of a hub id's pipeline.", min_length=1)
    download: bool = Field(False, description="Fetch a hub id that is not in the local cache; else that is an error.")
    control: Literal["edges", "masked"] = Field(
        "edges",
        description="What the ControlNet was trained to see: the product's edges (canny), or the product with the "
        "part to paint masked out (ControlNet-Inpaint).",
    )
    control_scale: float = Field(0.8, description="Weight of the ControlNet; 0 leaves it without effect.", ge=0, le=2)
    n_steps: int = Field(20, description="Denoising steps.", ge=1, le=1000)
    guidance_scale: float = Field(
        7.5, description="Classifier-free guidance: how closely the prompt is followed; 1 is without.", ge=1, le=50
    )
    negative_prompt: str = Field(
        "people, person, face, portrait, hands, text, letters, watermark, logo, blurry, deformed, low quality",
        description="What is not to be painted; without effect at a guidance_scale of 1.",
    )
    batch_size: int = Field(4, description="Pictures that are painted together, at most.", ge=1, le=256)
    device: Literal["auto", "cpu", "cuda"] = Field("auto", description="auto: the first CUDA device, else the CPU.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="Number format of the weights; auto: bfloat16 on CUDA, float32 on the CPU."
    )
    compile: bool = Field(
        False,
        description="Compile UNet and ControlNet with torch.compile: a minute or more at the first batch of each "
        "size, then quicker ones. For workers that paint hundreds of pictures.",
    )


class TinyMllmSettings(BaseModel):
    """Sizes of the G-MLLM that is built from a configuration."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hidden_size: int = Field(128, ge=16, description="Width of the language model.")
    n_layers: int = Field(4, ge=1, description="Layers of the language model.")
    n_heads: int = Field(4, ge=1, description="Attention heads of the language model.")
    vocab_size: int = Field(1_024, ge=300, description="Tokens of the tokenizer that is fitted to the instructions.")
    eyes: Literal["learnt", "statistics"] = Field(
        "statistics",
        description="Its vision tower: `learnt`: a small vision transformer that starts from nothing; `statistics`: "
        "the frozen first layers of EfficientNet-Lite0, which tell the style of a picture from the start.",
    )
    image_px: int = Field(64, ge=16, description="Side of a picture as the learnt tower reads it, in pixels.")
    patch_px: int = Field(16, ge=4, description="Side of a patch, one image token, in pixels.")
    vision_hidden_size: int = Field(64, ge=16, description="Width of the vision tower.")
    n_vision_layers: int = Field(2, ge=1, description="Layers of the vision tower.")


class MllmSettings(BaseModel):
    """The G-MLLM, which writes prompts for a group (section 3.3)."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    preset: Literal["tiny", "smol", "llava"] = Field(
        "tiny",
        description="What it is made of: `tiny` is built from a configuration and trained in minutes on a CPU, `smol` "
        "is SmolLM2-135M with EfficientNet-Lite0 for eyes, `llava` any LLaVA checkpoint.",
    )
    checkpoint: str | None = Field(None, description="Folder or hub id of the checkpoint that `llava` starts from.")
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Type of the weights. On a GPU training computes in bfloat16 either way; float32 keeps small "
        "updates of whole models, bfloat16 halves the memory of one that only an adapter is trained on.",
    )
    attention: Literal["sdpa", "flash_attention_2", "eager"] = Field(
        "sdpa",
        description="Attention: `sdpa` is PyTorch's own, `flash_attention_2` needs a GPU and the package flash-attn, "
        "`eager` is for comparison.",
    )
    group_hidden_size: int = Field(512, ge=1, description="Width of the hidden layer of e_G = MLP(G).")
    max_new_tokens: int = Field(96, ge=1, description="Longest prompt that it may write, in tokens.")
    temperature: float = Field(
        1.0, ge=0.0, le=4.0, description="Temperature of the draws; 0 takes the likeliest token each time."
    )
    top_p: float = Field(0.9, gt=0.0, le=1.0, description="Share of the probability that tokens are drawn from.")
    tiny: TinyMllmSettings = Field(TinyMllmSettings(), description="Sizes of the preset `tiny`.")


class RefreshSettings(BaseModel):
    """When new creatives are worth what they cost. Costs, values and budgets are in one currency of your own."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    value_per_click: float = Field(0.1, description="What a click more is worth.", ge=0.0)
    cost_per_image: float = Field(0.01, description="What a picture costs that is drawn, published or not.", ge=0.0)
    budget_per_product_day: float = Field(
        1.0, description="What pictures of a product may cost on one day of event time (UTC).", ge=0.0
    )
    horizon_days: float = Field(
        7.0, description="How long a new creative is reckoned with: days of event time.", gt=0.0, le=365.0
    )


class WatchSettings(BaseModel):
    """What the generator looks for in the online state, besides the shifts that it is told of."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    causes: tuple[Literal["fatigue", "new_product", "new_group"], ...] = Field(
        ("fatigue", "new_product"),
        description="What asks for creatives: `fatigue`: a group's best creative wears out; `new_product`: a product "
        "is shown by borrowed groups; `new_group`: a group is born beside older ones. Each is weighed like a shift.",
    )
    interval_s: float = Field(60.0, description="How often it looks, seconds of the clock.", gt=0.0)
    min_impressions: int = Field(
        500, description="Impressions, live and for life, from which a creative can be found to wear out.", ge=1
    )


class GeneratorSettings(BaseModel):
    """Settings of the generator."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    renderer: Literal["procedural", "diffusion"] = Field(
        "procedural",
        description="Who draws: procedural (on the CPU, from the prompt's words) or diffusion (Stable Diffusion).",
    )
    diffusion: DiffusionSettings = Field(DiffusionSettings(), description="The diffusion renderer.")
    size_px: int = Field(512, description="Side of a creative, in pixels.", ge=64, le=4096)
    n_candidates: int = Field(
        4,
        description="Prompts that are proposed for a group; the best ones whose pictures pass the checks are kept.",
        ge=1,
        le=64,
    )
    n_published: int = Field(1, description="Creatives that are published for a group, at most.", ge=1, le=64)
    storage_url: str = Field(
        "out/creatives",
        description="Where pictures are kept: a local path or an fsspec URL (file://, s3://, gs://).",
        min_length=1,
    )
    image_format: Literal["jpeg", "png"] = Field(
        "jpeg", description="File format: jpeg is about a tenth of the size, png is without loss."
    )
    jpeg_quality: int = Field(88, description="JPEG quality, 1 to 95; 88 gives 20 to 60 KB at 512 px.", ge=1, le=95)
    approval: Literal["auto", "manual"] = Field(
        "auto",
        description="auto: what passes the checks is published; manual: it waits until a person accepts it "
        "(`osmf creative queue`).",
    )
    review_url: str = Field(
        "out/review",
        description="Where pictures are kept that were refused or wait: a local path or an fsspec URL.",
        min_length=1,
    )
    state_path: Path = Field(
        Path("out/generator-state"),
        description="Folder of the generator's own LMDB environment: its offsets, handled shifts and outbox.",
    )
    consumer_group: str = Field(
        "osmf-generator", min_length=1, description="Group under which offsets are reported to the broker."
    )
    min_share: float = Field(
        0.03, description="Groups with a smaller share of the product's users get no creatives.", ge=0.0, le=1.0
    )
    exploration: float = Field(
        0.25,
        description="How far words are drawn from what is known of them, in posterior standard deviations: 0 always "
        "takes the best known words, 1 is Thompson sampling.",
        ge=0.0,
        le=4.0,
    )
    n_look_alikes: int = Field(
        8, description="Most similar groups of other products whose clicks may be borrowed for a group.", ge=0, le=256
    )
    max_compared_products: int = Field(
        500,
        description="Products whose groups are searched for look-alikes, those of the same category first.",
        ge=0,
        le=100_000,
    )
    features_kept: int = Field(
        256,
        description="Pictures whose image features are remembered in memory, the last compared, 250 KB each; "
        "others are read again.",
        ge=1,
    )
    n_compared: int = Field(
        6,
        description="Creatives that a group knows, the most shown ones, with which the reward model compares new ones.",
        ge=0,
        le=64,
    )
    ctr_spread: float = Field(
        0.25,
        description="Standard deviation of the logarithm of the CTRs of a product's creatives in a group: what the "
        "reward model's word on a new one is measured by.",
        gt=0.0,
        le=2.0,
    )
    queue_messages: int = Field(
        64,
        description="Messages that wait in memory at most; more stay on the broker. Of several shifts of a product "
        "among them only the latest is worked off.",
        ge=1,
        le=10_000,
    )
    watch: WatchSettings = Field(WatchSettings(), description="What asks for creatives besides shifts.")
    refresh: RefreshSettings = Field(RefreshSettings(), description="When new creatives are worth what they cost.")
    matting: MattingSettings = Field(MattingSettings(), description="Limits of the cut-outs that are made.")
    signing: SigningSettings = Field(SigningSettings(), description="Who signs published files.")
    checks: CheckSettings = Field(CheckSettings(), description="Limits of the checks before publication.")
    mllm: MllmSettings = Field(MllmSettings(), description="The model that writes prompts for a group.")
    models_dir: Path = Field(
        Path("out/offline"),
        description="Folder of the models of the offline chain (`offline.dataset_dir`), where the champion is.",
    )

    @model_validator(mode="after")
    def _check_renderer(self) -> GeneratorSettings:
        if self.renderer == "diffusion":
            if self.diffusion.pipeline is None:
                raise ValueError(
                    "generator.renderer is diffusion and generator.diffusion.pipeline is not set; "
                    "it names a folder or a hub id. Nothing could be rendered"
                )
            if self.size_px % LATENT_PX:
                raise ValueError(
                    f"generator.size_px {self.size_px} is not divisible by {LATENT_PX}, which the diffusion renderer "
                    "needs. Nothing could be rendered"
                )
        return self
